"""One number at every position instead of the vocabulary: reward models, and the critic of PPO.

The trunk is that of a causal model. On disk it is transformers' `<X>ForSequenceClassification` with `num_labels` 1: no
`lm_head`, a `score.weight` `[1, hidden]` without bias, and the score of a text is the number at its last token.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.errors import DataError
from megatron_r1.model.family import HFConfig, Rule
from megatron_r1.model.hf_folder import Weights

CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
SCORE = "score.weight"
_HEAD = "output_layer.weight"


class ScalarHead(MegatronModule):
    """`[..., hidden]` to `[..., 1]`, computed in float32: bfloat16 would leave a score two to three digits.

    It starts at N(0, init_std^2), small so that a critic begins near 0 and the Bradley-Terry loss near log 2, and not
    at 0, where the trunk would get no gradient. Drawn on the CPU, so every rank and device begins alike.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        weight = torch.empty(1, config.hidden_size).normal_(0.0, config.init_method_std)
        self.weight = torch.nn.Parameter(weight.to(config.params_dtype))

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Value and, as Megatron's output layers give it, no bias."""
        if self.config.sequence_parallel:  # every tensor-parallel rank scores all tokens, so no gradient is summed
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return F.linear(hidden.float(), self.weight.float()), None


class ScalarModel(GPTModel):
    """A GPTModel whose forward gives float32 values `[batch, seq]`, whatever labels it is given.

    Takes what GPTModel takes. The vocabulary's layer is made and dropped: Megatron's constructor always makes one.
    """

    def __init__(self, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(config=config, **arguments)
        if self.post_process:
            self.output_layer = ScalarHead(config)

    def forward(self, *inputs: Any, labels: torch.Tensor | None = None, **named: Any) -> torch.Tensor:
        """Values of the text up to and including each token `[batch, seq]`; of an inner stage what it sends."""
        values: torch.Tensor = super().forward(*inputs, **named)
        return values.squeeze(-1) if self.post_process else values


def is_classifier(hf: HFConfig) -> bool:
    """Whether a `config.json` describes a model with a scalar head.

    Raises:
        DataError: it is a classifier of more than one label.
    """
    if not hf["architectures"][0].endswith(CLASSIFIER):
        return False
    labels = hf.get("num_labels", len(hf.get("id2label", ())))
    if labels != 1:
        raise DataError(
            f"config.json: {hf['architectures'][0]} has {labels or 'the default 2'} labels, only 1 is known"
        )
    return True


def causal_architecture(hf: HFConfig) -> str:
    """The architecture whose trunk the model has."""
    architecture: str = hf["architectures"][0]
    return architecture.removesuffix(CLASSIFIER) + CAUSAL if architecture.endswith(CLASSIFIER) else architecture


def as_classifier(hf: HFConfig) -> HFConfig:
    """The `config.json` of a causal model's trunk with a scalar head.

    transformers scores the last token that is not padding; where padding is the end-of-sequence token it would skip the
    very token that is scored, so then no padding token is named (batches of one, or vLLM's, need none).
    """
    architecture = causal_architecture(hf).removesuffix(CAUSAL) + CLASSIFIER
    labels = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    config = {**hf, "architectures": [architecture], **labels, "tie_word_embeddings": False}
    if "num_nextn_predict_layers" in hf:
        config["num_nextn_predict_layers"] = 0
    eos = hf.get("eos_token_id")
    if hf.get("pad_token_id") in (eos if isinstance(eos, list) else [eos]):
        config.pop("pad_token_id", None)
    return config


def scalar_rules(rules: Iterable[Rule]) -> Iterator[Rule]:
    """A family's rules with the score in the vocabulary's place."""
    yield from (rule for rule in rules if rule.megatron != _HEAD)
    yield Rule(_HEAD, (SCORE,))


class TrunkWeights:
    """A causal model's weights, read as those of a scalar model: its own heads left out, a new one added.

    Args:
        weights: the causal model's.
        causal: its family's rules.
        scalar: the scalar model's rules.
        head: value of `score.weight`, None on a pipeline stage that has none. [1, hidden]
    """

    def __init__(
        self, weights: Weights, causal: Iterable[Rule], scalar: Iterable[Rule], head: torch.Tensor | None
    ) -> None:
        self._weights, self._left_out, self._head = weights, _names(causal) - _names(scalar), head

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._weights if name not in self._left_out)
        yield SCORE

    def __contains__(self, name: object) -> bool:
        return name == SCORE or (name not in self._left_out and name in self._weights)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == SCORE and self._head is not None:
            return self._head
        return self._weights[name]


def _names(rules: Iterable[Rule]) -> set[str]:
    return {name for rule in rules for name in (*rule.hf, *rule.copies, *rule.redundant)}
