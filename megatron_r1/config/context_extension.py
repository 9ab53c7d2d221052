"""[model.context]: a pretrained model goes on with a longer context."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_r1.config.section import Section


class ContextSection(Section):
    """[model.context]: YaRN (arXiv 2309.00071) with DeepSeek-V3's numbers (4.3). Goes into the exported `config.json`.

    A run that extends an already extended model repeats the section with another `max_position_embeddings`.
    """

    max_position_embeddings: PositiveInt
    """The new context, tokens; at most `factor` times the original one."""
    factor: Annotated[float, Field(ge=1)] = 40.0
    """s, how many times the original context the positions are scaled for."""
    beta_fast: PositiveFloat = 32.0
    """Dimensions that turn more often than this in the original context keep their frequency."""
    beta_slow: PositiveFloat = 1.0
    """Dimensions that turn less often than this have it divided by `factor`."""
    mscale: NonNegativeFloat = 1.0
    """With `mscale_all_dim` the same, rotations keep their length, and attention's logits are multiplied by
    (0.1 mscale_all_dim ln(factor) + 1)^2."""
    mscale_all_dim: NonNegativeFloat = 1.0
    original_max_position_embeddings: PositiveInt | None = None
    """The context of pretraining. Default: what `config.json` says."""
