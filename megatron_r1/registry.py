"""Components by name: a built-in's short name; `package.module:Name` or `folder/file.py:Name` for a user's own."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_r1.errors import ConfigError, nearest

BUILT_IN: dict[str, dict[str, str]] = {
    "task": {
        "code": "megatron_r1.data.tasks.code:Code",
        "general": "megatron_r1.data.tasks.general:General",
        "human_eval": "megatron_r1.data.tasks.human_eval:HumanEval",
        "live_code_bench": "megatron_r1.data.tasks.live_code_bench:LiveCodeBench",
        "logic": "megatron_r1.data.tasks.logic:Logic",
        "math": "megatron_r1.data.tasks.math:Math",
        "mixture": "megatron_r1.data.tasks.mixture:Mixture",
        "reasoning_gym": "megatron_r1.data.tasks.reasoning_gym:ReasoningGym",
        "stem": "megatron_r1.data.tasks.stem:Stem",
    },
    "reward": {
        "accuracy": "megatron_r1.reward.accuracy:Accuracy",
        "code": "megatron_r1.reward.code:Code",
        "code_format": "megatron_r1.reward.code_format:CodeFormat",
        "cosine": "megatron_r1.reward.cosine:Cosine",
        "equations": "megatron_r1.reward.equations:Equations",
        "format": "megatron_r1.reward.format:Format",
        "language_consistency": "megatron_r1.reward.language_consistency:LanguageConsistency",
        "length": "megatron_r1.reward.length:Length",
        "model_judge": "megatron_r1.reward.model_judge:ModelJudge",
        "multiple_choice": "megatron_r1.reward.multiple_choice:MultipleChoice",
        "reasoning_steps": "megatron_r1.reward.reasoning_steps:ReasoningSteps",
        "repetition_penalty": "megatron_r1.reward.repetition_penalty:RepetitionPenalty",
        "reward_model": "megatron_r1.reward.reward_model:RewardModel",
        "soft_overlong_punishment": "megatron_r1.reward.soft_overlong_punishment:SoftOverlongPunishment",
        "tag_count": "megatron_r1.reward.tag_count:TagCount",
        "task": "megatron_r1.reward.task:TaskVerifier",
    },
    "source": {
        "worked": "megatron_r1.data.worked:Worked",
    },
    "advantage": {
        "gae": "megatron_r1.advantage.gae:Gae",
        "group_relative": "megatron_r1.advantage.group_relative:GroupRelative",
        "leave_one_out": "megatron_r1.advantage.leave_one_out:LeaveOneOut",
        "process": "megatron_r1.advantage.process:Process",
    },
    "loss": {
        "cispo": "megatron_r1.loss.cispo:Cispo",
        "grpo": "megatron_r1.loss.grpo:Grpo",
        "gspo": "megatron_r1.loss.gspo:Gspo",
        "ppo": "megatron_r1.loss.ppo:Ppo",
    },
    "tool": {
        "python": "megatron_r1.rollout.tools.python:Python",
    },
    "family": {
        "DeepseekV2ForCausalLM": "megatron_r1.model.families.deepseek_v2:DeepseekV2",
        "DeepseekV3ForCausalLM": "megatron_r1.model.families.deepseek_v3:DeepseekV3",
        "LlamaForCausalLM": "megatron_r1.model.families.llama:Llama",
        "MixtralForCausalLM": "megatron_r1.model.families.mixtral:Mixtral",
        "Qwen2ForCausalLM": "megatron_r1.model.families.qwen2:Qwen2",
        "Qwen3ForCausalLM": "megatron_r1.model.families.qwen3:Qwen3",
        "Qwen3MoeForCausalLM": "megatron_r1.model.families.qwen3_moe:Qwen3Moe",
    },
}


def resolve(kind: str, name: str) -> Any:
    """The object that `name` stands for.

    Args:
        kind: one of the keys of `BUILT_IN`.
        name: a built-in's name, `package.module:Name`, or `folder/file.py:Name`.

    Raises:
        ConfigError: no such built-in (the nearest is named), or the import fails.
    """
    built_in = BUILT_IN[kind]
    target = built_in.get(name, name)
    if ":" not in target:
        raise ConfigError(
            f"no {kind} is called {name!r}{nearest(name, built_in)}; "
            f"built in: {', '.join(sorted(built_in))}; your own is named 'package.module:Name' or 'folder/file.py:Name'"
        )
    module, _, attribute = target.rpartition(":")
    try:
        loaded = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except (ImportError, ValueError, OSError, SyntaxError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported: {error}") from error
    except Exception as error:  # whatever a user's own code raises
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{kind} {name!r} cannot be imported: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
        ) from error
    if not hasattr(loaded, attribute):
        raise ConfigError(
            f"{kind} {name!r} cannot be imported: {module} defines no {attribute!r}{nearest(attribute, vars(loaded))}"
        )
    return getattr(loaded, attribute)


def _load_file(path: Path) -> ModuleType:
    """The module in a file that is on no import path; loaded once."""
    name = f"megatron_r1_file:{path.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
