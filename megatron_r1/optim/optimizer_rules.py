"""What of [optim] does not go together with [model], as one table.

Most of it is what megatron-core 0.16.1 asserts (optimizer_config.py:340), said before anything is built and in the
words of a run file. `docs/kernels.md` has the table, too.
"""

from megatron_r1.model.kernel_rules import Rule

OPTIM_RULES = [
    Rule(
        "optim.moments, gradients, master or offload other than the defaults, in float32",
        lambda s: s.section.dtype == "float32",
        "lower precision and offloading are those of a bfloat16 model's optimizer",
        'write dtype = "bfloat16"',
    ),
    Rule(
        "optim.moments, gradients or master other than float32 without Transformer Engine",
        lambda s: s.machine.cuda is None or s.older("2.1"),
        "of all optimizers only its FusedAdam keeps them so (megatron-core's precision-aware optimizer)",
        "leave them out, or install transformer-engine on a machine with a GPU",
    ),
    Rule(
        'optim.master = "float16" with model.fp8.parameters',
        lambda s: bool(s.kernels.fp8 and s.kernels.fp8.parameters and s.optim and s.optim.master == "float16"),
        "8-bit weights are made from Megatron's own float32 copy",
        'write master = "float32"',
    ),
    Rule(
        "optim.moments or master other than float32 with offload",
        lambda s: bool(s.optim and s.optim.offload and {s.optim.moments, s.optim.master} != {"float32"}),
        "megatron-core's offloading optimizer keeps all of it in float32",
        "leave them out, or leave `offload` out",
    ),
]
"""[optim]'s, where `OptimSection.precision_aware`."""
