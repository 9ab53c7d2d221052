"""DeepSeek-V3's run files against its report (arXiv 2412.19437; 3.1, 4.2, 4.3), from TOML to the figures of a step."""

import json
from pathlib import Path

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.runs import PretrainConfig
from megatron_r1.config.schedule import value_at
from megatron_r1.model.context_extension import extended
from megatron_r1.optim.schedule import LearningRate
from megatron_r1.train.batch_ramp import Ramp

ROOT = Path(__file__).parents[2]
GPUS = 2048
T = 10**12


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run_file(name: str) -> PretrainConfig:
    return load(ROOT / f"examples/deepseek_v3/{name}.toml", [], PretrainConfig)


@pytest.mark.parametrize(
    ("tokens", "batch", "lr", "bias_speed", "mtp_weight"),
    [
        (0, 3072, None, 0.001, 0.3),
        (1 * T, 15360, 2.2e-4, 0.001, 0.3),
        (9.99 * T, 15360, 2.2e-4, 0.001, 0.3),
        (10.01 * T, 15360, None, 0.001, 0.1),
        (12.15 * T, 15360, (2.2e-4 + 2.2e-5) / 2, 0.001, 0.1),
        (14.31 * T, 15360, 2.2e-5, 0.0, 0.1),
        (14.64 * T, 15360, 7.3e-6, 0.0, 0.1),
        (14.8 * T, 15360, 7.3e-6, 0.0, 0.1),
    ],
)
def test_pretraining(tokens: float, batch: int, lr: float | None, bias_speed: float, mtp_weight: float) -> None:
    config = run_file("pretrain")
    assert config.tokens == 14.8 * T
    ramp = Ramp(config.batch_ramp, config.batch, config.corpus.sequence_length)
    rate = LearningRate(config.optim.lr, config.optim.warmup_steps, config.optim.phases, ramp.tokens_before)
    step = ramp.steps(round(tokens))
    before = ramp.tokens_before(step)
    assert ramp.batch(step) == batch
    assert lr is None or rate.at(step) == pytest.approx(lr, rel=1e-4)
    assert value_at(config.model.bias_update_rate, before) == bias_speed
    assert value_at(config.model.mtp_loss_coef, before) == mtp_weight


def test_warm_up_of_two_thousand_steps() -> None:
    config = run_file("pretrain")
    rate = LearningRate(config.optim.lr, config.optim.warmup_steps, config.optim.phases, lambda step: step)
    assert [rate.at(step) for step in (0, 999, 1999, 2000)] == pytest.approx([1.1e-7, 1.1e-4, 2.2e-4, 2.2e-4])


@pytest.mark.parametrize(("name", "context", "batch"), [("extend_32k", 32768, 1920), ("extend_128k", 131072, 480)])
def test_extension(name: str, context: int, batch: int) -> None:
    config = run_file(name)
    assert (config.steps, config.batch, config.optim.lr, config.optim.schedule) == (1000, batch, 7.3e-6, "constant")
    assert config.corpus.sequence_length == config.model.context.max_position_embeddings == context
    assert Ramp(None, batch, context).tokens_before(1000) == 62_914_560_000


def test_each_goes_on_from_the_one_before() -> None:
    base, first, second = (run_file(name) for name in ("pretrain", "extend_32k", "extend_128k"))
    assert first.model.path == base.output / "hf"
    assert second.model.path == first.output / "hf"
    hf = json.loads((base.model.path / "config.json").read_text())
    assert hf["max_position_embeddings"] == base.corpus.sequence_length == 4096
    for run in (first, second):
        hf = extended(hf, run.model.context)
    released = json.loads((ROOT / "tests/convert/deepseek_v3.json").read_text())
    same = released.keys() - {"max_position_embeddings", "initializer_range", "quantization_config"}
    assert {key: hf[key] for key in same} == {key: released[key] for key in same}


@pytest.mark.parametrize("name", ["pretrain", "extend_32k", "extend_128k"])
def test_batches_divide_among_the_gpus(name: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    config = run_file(name)
    parallel, hf = config.parallel, json.loads((ROOT / "examples/deepseek_v3/model/config.json").read_text())
    assert (parallel.tensor, parallel.pipeline, parallel.expert) == (1, 16, 64)
    data = GPUS // (parallel.pipeline * parallel.context)
    assert (data * parallel.context) % parallel.expert == 0
    assert config.corpus.sequence_length % (2 * parallel.context) == 0
    ramp = Ramp(config.batch_ramp, config.batch, config.corpus.sequence_length)
    assert [batch for batch in ramp.sizes if batch % (config.microbatch * data)] == []
    stages = PipelineParallelLayerLayout.parse_str_to_list(parallel.pipeline_layout)
    assert len(stages) == parallel.pipeline
    names = [layer.name for stage in stages for layer in stage]
    assert names.count("decoder") == hf["num_hidden_layers"]
    assert names.count("mtp") == hf["num_nextn_predict_layers"]
