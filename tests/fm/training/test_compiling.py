"""train.compile: how many graphs it makes, that they are whole, and that what is trained does not depend on it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_inputs, make_spec, stir
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit
from whole_runs import last_weights, log, small

from data_pipeline.errors import UserError
from fm.config import FinetuneSettings, LossSettings, Recipe
from fm.distributed import make_accelerator
from fm.model.attention import LinearAttention, rope_table
from fm.model.baselines import Baseline, BaselineConfig
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import Unroll
from fm.training.state import VARIABLE, compile_objective
from fm.training.trainer import train

GRAPHS: list[torch.fx.GraphModule] = []
KINDS = (
    "acoustic_scattering_maze",
    "rayleigh_benard",
    "shear_flow",
)  # with ends on 2, 1 and 0 axes


@torch._dynamo.register_backend(name="counting")
def _counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Counts graphs and leaves them as they are."""
    GRAPHS.append(graph)
    return graph.forward


@torch._dynamo.register_backend(name="counting_both")
def _counting_both(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Counts graphs; compiles forward and backward to eager operations, as a compiler would see them."""
    GRAPHS.append(graph)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@torch._dynamo.register_backend(name="failing")
def _failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Fails for every graph."""
    raise NotImplementedError("no kernel for this graph\nand much more text")


@torch._dynamo.register_backend(name="failing_backward")
def _failing_backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Compiles forward passes, and fails for backward passes."""

    def fail(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise NotImplementedError("no kernel for this graph\nand much more text")

    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=fail)(graph, inputs)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that the test makes."""
    monkeypatch.setenv(VARIABLE, ":counting")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    GRAPHS.clear()
    yield GRAPHS
    torch._dynamo.reset()


def recipe_for(way: str, **sections: dict[str, Any]) -> Recipe:
    return small(Path("shards"), Path("run"), train={"steps": 8, "compile": way}, **sections)


def small_objective(finetune: FinetuneSettings | None = None, **sizes: Any) -> Unroll:
    """Of the three KINDS of datasets; the same numbers whenever it is made."""
    config = ModelConfig(**{"width": 16, "depth": 1, "heads": 2, **sizes})
    return Unroll(stir(WaveLiTFM(config, [make_spec(name) for name in KINDS])), LossSettings(), finetune)


@pytest.fixture
def one_graph() -> Iterator[None]:
    """Let torch make one graph of a function, as if there were nine datasets: its own limit is 8 graphs."""
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        yield


def gradient(objective: Unroll, dataset: str, steps: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The loss of a window of `steps` steps and the gradient of every parameter."""
    state, constants = make_inputs(objective.model.specs[dataset], *grid)
    fields = torch.stack([state + 0.1 * k for k in range(steps + 1)], dim=1)
    forced = torch.ones(len(state), steps, dtype=torch.bool).triu()
    objective.zero_grad()
    loss = objective(fields, constants, forced, dataset)["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To float32's rounding, of sums over all tokens."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= 1e-4 * scale + 1e-9, name


def grid_of(number: int) -> tuple[int, int]:
    return 16 + 2 * number, 20


@pytest.mark.usefixtures("one_graph")
def test_blocks_share_one_graph_for_each_dataset(graphs: list[torch.fx.GraphModule]) -> None:
    sizes = {"depth": 3, "pyramid_levels": 0}
    eager, compiled = small_objective(**sizes), small_objective(**sizes)
    compile_objective(compiled, recipe_for("blocks"), make_accelerator(1.0))
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for number, name in enumerate(KINDS):
        assert_equal(gradient(compiled, name, 1, grid_of(number)), gradient(eager, name, 1, grid_of(number)))
        assert len(graphs) == number + 1  # of three blocks
    gradient(compiled, "shear_flow", 3, grid_of(KINDS.index("shear_flow")))
    assert len(graphs) == len(KINDS)  # however many steps
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("one_graph")
def test_a_step_is_one_graph_for_each_dataset_and_length(graphs: list[torch.fx.GraphModule]) -> None:
    sizes = {"pyramid_levels": 0}
    eager, compiled = small_objective(**sizes), small_objective(**sizes)
    compile_objective(compiled, recipe_for("step"), make_accelerator(1.0))
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for number, (name, steps) in enumerate([*((name, 1) for name in KINDS), ("shear_flow", 2)]):
        for _ in range(2):
            assert_equal(gradient(compiled, name, steps, (16, 20)), gradient(eager, name, steps, (16, 20)))
        assert len(graphs) == number + 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("objective", "checkpoints"), [("scheduled_sampling", True), ("causal_bptt", False), ("pushforward", False)]
)
def test_unrolls_are_one_graph(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch, objective: str, checkpoints: bool
) -> None:
    monkeypatch.setenv(VARIABLE, ":counting_both")
    finetune = FinetuneSettings(pretrained="x", objective=objective, checkpoint_activations=checkpoints)
    eager, compiled = (small_objective(finetune, pyramid_levels=0) for _ in range(2))
    compile_objective(compiled, recipe_for("step"), make_accelerator(1.0))
    expected = gradient(eager, "rayleigh_benard", 2, (16, 20))
    assert_equal(gradient(compiled, "rayleigh_benard", 2, (16, 20)), expected)
    assert len(graphs) == 1


def test_a_graph_too_many_is_an_error() -> None:
    objective = small_objective(pyramid_levels=0)
    compile_objective(objective, recipe_for("blocks"), make_accelerator(1.0))
    with torch._dynamo.config.patch(recompile_limit=1):
        gradient(objective, "shear_flow", 1, (16, 20))
        with pytest.raises(FailOnRecompileLimitHit, match="fullgraph"):
            gradient(objective, "shear_flow", 1, (20, 16))


def test_inductor_agrees_with_eager() -> None:
    """C++ takes its time, so it is attention alone: feature map, rotation, ridge solve, and back."""
    eager = LinearAttention(8, heads=2)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    compiled, found = copy.deepcopy(eager), []
    compiled.compile(fullgraph=True, dynamic=False)
    z = torch.randn(2, 96, 8, generator=torch.Generator().manual_seed(0))
    for attention in (eager, compiled):
        loss = attention(z, rope_table(8, 12, 4)).square().mean()
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in attention.named_parameters()}})
    assert_equal(found[1], found[0])


def test_a_compiled_run_is_the_run(tiny_shards: Path, tmp_path: Path, graphs: list, monkeypatch: Any) -> None:
    """Losses to rounding; interrupted and continued, bit for bit."""
    assert train(small(tiny_shards, tmp_path / "eager")) == 0
    assert not graphs
    monkeypatch.setenv(VARIABLE, "blocks:counting_both")
    assert train(small(tiny_shards, tmp_path / "compiled")) == 0
    assert len(graphs) == 2
    eager, compiled = ([line["loss"] for line in log(tmp_path / run)] for run in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-5)
    for stop_at in (5, None):
        assert train(small(tiny_shards, tmp_path / "resumed", run={"stop_at": stop_at})) == 0
    assert last_weights(tmp_path / "resumed") == last_weights(tmp_path / "compiled")


@pytest.mark.parametrize("backend", ["failing", "failing_backward"])
def test_what_auto_cannot_compile_runs_eagerly_with_one_message(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    options = {"train": {"steps": 3}, "model": {"depth": 2}}
    monkeypatch.setenv(VARIABLE, "eager")
    assert train(small(tiny_shards, tmp_path / "eager", **options)) == 0
    monkeypatch.setenv(VARIABLE, f"blocks:{backend}")
    capsys.readouterr()
    assert train(small(tiny_shards, tmp_path / "auto", **options)) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("uncompiled") == 1
    assert "torch.compile failed (NotImplementedError: no kernel for this graph). train.compile=eager" in said.out
    assert last_weights(tmp_path / "auto") == last_weights(tmp_path / "eager")


def test_what_cannot_be_compiled_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, objective = make_accelerator(1.0), small_objective()
    with pytest.raises(UserError, match=r"compile=graphs: expected one process on a GPU, got 1 .* on cpu; use blocks"):
        compile_objective(objective, recipe_for("graphs"), accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"compile=step: under FSDP and DeepSpeed only blocks .* use blocks"):
        compile_objective(objective, recipe_for("step"), accelerator)
    monkeypatch.setenv(VARIABLE, "blocks:counting")
    baseline: Any = Baseline(BaselineConfig("wno", {"width": 8, "depth": 1}), [make_spec("shear_flow")])
    compile_objective(Unroll(baseline, LossSettings()), recipe_for("auto"), accelerator)
    assert baseline._compiled_call_impl is None
    with pytest.raises(UserError, match=r"compile=step: baselines are not compiled.*leave train\.compile out"):
        compile_objective(Unroll(baseline, LossSettings()), recipe_for("step"), accelerator)


def test_a_machine_without_compiler_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv(VARIABLE, "blocks")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    objective, accelerator = small_objective(), make_accelerator(1.0)
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        compile_objective(objective, recipe_for("auto"), accelerator)
        with pytest.raises(UserError) as error:
            compile_objective(objective, recipe_for("blocks"), accelerator)
    assert capsys.readouterr().out.count("training is not compiled: train.compile: torch.compile does not work") == 1
    assert all(block._compiled_call_impl is None for block in objective.model.blocks)
    assert "does not work on this machine (" in str(error.value)
    assert "apt install g++" in str(error.value)
    assert "no-such-compiler" in str(error.value)
