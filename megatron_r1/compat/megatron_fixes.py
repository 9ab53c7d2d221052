"""Corrections of megatron-core 0.16.1 where it runs without Transformer Engine or CUDA, one function a module.

Each says what is wrong upstream. They are applied by `megatron_cpu`'s import hook: all without CUDA, with CUDA those
that are not about the device (`ON_GPUS`). Lines are those of 0.16.1 where no other version is named; each can go when
the line that it names is fixed upstream.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of Transformer Engine's and Apex's FusedAdam.

    Their step count lives in the parameter group, torch's lives beside each parameter. Megatron's
    distributed optimizer can load only the former (its torch path ends in KeyError 'step',
    distrib_optimizer.py:940), and with the same layout CPU and GPU checkpoints are the same.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            if not params:
                continue
            adam(
                params,
                [param.grad for param in params if param.grad is not None],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                # On the parameters' device: CUDA's kernel reads them there.
                [torch.full((), group["step"] - 1.0, device=param.device) for param in params],
                fused=True,
                decoupled_weight_decay=self.adam_w_mode,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _without_fused_adam() -> bool:
    return not torch.cuda.is_available() or not (_installed("transformer_engine") or _installed("apex"))


def _optimizer(module: ModuleType) -> None:
    """Without Transformer Engine or Apex it takes torch's Adam, whose state the distributed optimizer cannot load."""
    if _without_fused_adam():
        vars(module).update(Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)


def _distributed_optimizer(module: ModuleType) -> None:
    """:641 and :940, the torch-Adam path asserts on saving and fails on loading."""
    if _without_fused_adam():
        vars(module).update(Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


def _recomputation(module: ModuleType) -> None:
    """:636 takes its own default, fp8=False, for FP8, so that :589 asks Transformer Engine: without it a NameError."""
    names = vars(module)
    if not names["HAVE_TE"]:
        names["CheckpointWithoutOutput"].__init__.__defaults__ = (None,)


def _random(module: ModuleType) -> None:
    """:235-277 read and write the CUDA generator."""
    _recomputation(module)
    names = vars(module)
    names["_get_cuda_rng_state"] = lambda *args, **kwargs: torch.get_rng_state()
    names["_set_cuda_rng_state"] = lambda state, *args, **kwargs: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = names["_MODEL_PARALLEL_RNG_TRACKER_NAME"]) -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    names["CudaRNGStatesTracker"].fork = fork


def _multi_latent_attention(module: ModuleType) -> None:
    """:64 HAVE_TE is True without TE. :569 k_pos_emb's gradient is not summed over the heads of TP ranks.

    The latter where plain torch's layers gather it over TP ranks; Transformer Engine's gather it over the sequence,
    which sums. In 0.19.2 a model with norms that does not compress queries (DeepSeek-V2-Lite, Moonlight) has to have a
    norm before their projection (mla_qk_norm_config.py:160), which these models have not.
    """
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    names = vars(module)
    names["HAVE_TE"] = _installed("transformer_engine")
    apply = names["apply_rotary_pos_emb"]

    def apply_rotary_pos_emb(t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A rank's only query head is a slice of a wider vector; k_pos_emb, one for all heads, is whole.
        local = kwargs["config"].transformer_impl == "local"
        shared_by_heads = local and t.size(-2) == 1 and t.stride(-2) == t.size(-1)
        rotated: torch.Tensor = apply(
            copy_to_tensor_model_parallel_region(t) if shared_by_heads else t, *args, **kwargs
        )
        return rotated

    names["apply_rotary_pos_emb"] = apply_rotary_pos_emb
    if resolver := names.get("QKNormConfigResolver"):
        either = resolver._mla_fused_linear_or_default

        def linear(self: Any, module: Any, name: str) -> Any:
            return self._non_fused_or_default(module, name) if name == "linear_q_proj" else either(self, module, name)

        resolver._mla_fused_linear_or_default = linear


def _multi_token_prediction(module: ModuleType) -> None:
    """In 0.19.2 (:876) each microbatch's MTP loss is divided by its own tokens that have one two ahead.

    So gradients would depend on what is packed together. As in 0.16 it is a sum, which `finalize_model_grads` divides
    by the tokens of the whole batch (DeepSeek-V3, arXiv 2412.19437, eq. 24). Right predictions are not counted, either:
    that takes a pass over the logits. Can go when upstream no longer rescales.
    """
    names = vars(module)
    if not (upstream := names.get("process_mtp_loss")):
        return

    def process_mtp_loss(**call: Any) -> torch.Tensor:
        config, labels, mask = call["config"], call["labels"], call["loss_mask"]
        if labels is not None and not config.calculate_per_token_loss:
            whole: torch.Tensor = upstream(**call)
            return whole
        hidden, *ahead = call["hidden_states"].chunk(1 + config.mtp_num_layers)
        if labels is None:
            return hidden
        places = {"cp_group": call["cp_group"], "packed_seq_params": call["packed_seq_params"]}
        mask = torch.ones_like(labels) if mask is None else mask
        for number, states in enumerate(ahead):
            logits, _ = call["output_layer"](
                states, weight=call["output_weight"], runtime_gather_output=call["runtime_gather_output"]
            )
            labels, _ = names["roll_tensor"](labels, **places)
            mask, tokens = names["roll_tensor"](mask, **places)
            loss = mask * call["compute_language_model_loss"](labels, logits)
            if call["is_training"]:
                zero = tokens.new_zeros(())
                names["MTPLossLoggingHelper"].save_metrics_to_tracker(
                    loss.sum() / tokens, zero, zero, number, config.mtp_num_layers
                )
            scale = config.mtp_loss_scaling_factor / config.mtp_num_layers
            hidden = names["MTPLossAutoScaler"].apply(hidden, scale * loss)
        return hidden

    names["process_mtp_loss"] = process_mtp_loss


def _moe_utils(module: ModuleType) -> None:
    """:1192 NameError without TE. :1096 turns split sizes into numpy only for CUDA tensors."""
    names = vars(module)
    names.setdefault("te_general_gemm", None)
    if torch.cuda.is_available():
        return

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    names["maybe_move_tensor_to_cpu"] = maybe_move_tensor_to_cpu


def _jit(module: ModuleType) -> None:
    """Fuses with torch.compile, which costs tens of seconds on CPU and gains nothing at these sizes."""
    module.disable_jit_fuser()


FIXES: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.jit": _jit,
    "megatron.core.optimizer": _optimizer,
    "megatron.core.optimizer.distrib_optimizer": _distributed_optimizer,
    "megatron.core.tensor_parallel.random": _random,
    "megatron.core.transformer.multi_latent_attention": _multi_latent_attention,
    "megatron.core.transformer.moe.moe_utils": _moe_utils,
    "megatron.core.transformer.multi_token_prediction": _multi_token_prediction,
}

ON_GPUS: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.optimizer": _optimizer,
    "megatron.core.optimizer.distrib_optimizer": _distributed_optimizer,
    "megatron.core.tensor_parallel.random": _recomputation,
    "megatron.core.transformer.multi_latent_attention": _multi_latent_attention,
    "megatron.core.transformer.moe.moe_utils": _moe_utils,
    "megatron.core.transformer.multi_token_prediction": _multi_token_prediction,
}
"""What is not about the device: each looks whether it is needed."""
