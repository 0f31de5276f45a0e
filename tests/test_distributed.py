"""Beyond one machine: sharded runs are one process's runs, bit for bit.

Four processes on the loopback, started once, run all checks of `distributed_workers` (fewer ranks are meshes over some
of them); the tests here read what they found. What needs no processes, the arithmetic of owners and bytes, is tested
up to 512 ranks on paper, and against a fake process group.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import distributed_workers
import pytest
import torch
from distributed_workers import CLASSES, KINDS, RECIPES, SOME, WORLD

import hbfunc
from hbfunc.exchange import Spec, box, cost, costs, dtensor, on_paper, owners
from hbfunc.race.__main__ import main

PAGE = Path(__file__).parents[1] / "hbfunc/docs/distributed.md"
LIMIT = 560  # seconds until hanging processes are ended


def launched(folder: Path, mode: str) -> tuple[dict, dict]:
    """What the checks return, and their seconds. Of several workers of pytest, one launches and the others wait."""
    folder.mkdir(exist_ok=True)
    try:
        os.close(os.open(folder / "launched", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        end = time.monotonic() + LIMIT
        while not (folder / "done").exists():
            assert time.monotonic() < end, "the launch of the other worker has not ended"
            time.sleep(1)
    else:
        # Without MKL_CBWR, the last bits of a product depend on where in memory a matrix starts, on some CPUs.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MKL_CBWR": "AVX2"}
        command = [sys.executable, str(Path(distributed_workers.__file__))]
        ranks = [
            subprocess.Popen([*command, str(r), str(folder), mode], env=environment, stderr=subprocess.PIPE, text=True)
            for r in range(WORLD)
        ]
        end = time.monotonic() + LIMIT
        try:
            messages = [rank.communicate(timeout=max(1, end - time.monotonic()))[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
            (folder / "done").touch()
        (folder / "messages").write_text("\n".join(messages))
    if not (folder / "results").exists():
        pytest.fail((folder / "messages").read_text()[-5000:] if (folder / "messages").exists() else "no results")
    return pickle.loads((folder / "results").read_bytes())


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """check name -> what it returned."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return launched(shared / "distributed", "fast")[0]


def result(found, name):
    """What a check returned. Checks after the first that failed were not run."""
    if name not in found:
        pytest.fail(f"not run, after the failure of {list(found)[-1]}")
    assert not isinstance(found[name], str), found[name]
    return found[name]


def assert_same(checked, expected):
    """Bit for bit, parameters and state, for every name in `expected`."""
    assert set(checked) == set(expected)
    assert {k: v for k, v in checked.items() if v != {"error": 0.0, "state": "same"}} == {}


@pytest.mark.parametrize("name", CLASSES)
def test_ten_sharded_steps_are_those_of_one_process(found, name):
    """Four ranks: 7 rows, 1 row and 3 elements, equal shapes and sizes, frozen, 0-d, now and then no gradient."""
    assert result(found, "check_fully_sharded")[name] == {"error": 0.0, "state": "same"}


@pytest.mark.parametrize("check", ["two_ranks", "hsdp", "tensor_parallel", "ddp"])
def test_the_same_on_other_meshes(found, check):
    """FSDP2 on 2 ranks, HSDP on 2x2, FSDP2 over tensor parallel on 2x2, DDP."""
    assert_same(result(found, f"check_{check}"), KINDS)


def test_replicated_and_cut_along_any_dim(found):
    checked = result(found, "check_placements")
    assert len(checked) == 6
    assert_same(checked, checked)


def test_options_that_need_whole_leaves_or_draws(found):
    """Norms, on 4 ranks too; keyed rounding of states and parameters, blocks, averages, a unit per leaf, rules that
    mix leaves."""
    checked = {k: v for k, v in result(found, "check_options").items() if not k.startswith("norm")}
    assert len(checked) == 18
    assert_same(checked, checked)


def test_the_norm_of_all_gradients_is_that_of_all_shards(found):
    """One sum over 2 or 4 ranks, in another order than in one process."""
    checked = {k: v["error"] for k, v in result(found, "check_options").items() if k.startswith("norm")}
    assert len(checked) == 4
    assert all(error < 1e-6 for error in checked.values())


def test_state_and_work_are_divided(found, record_property):
    """At most 0.3 of the state bytes on each of 4 ranks, at most ceil(k / 4) of k matrices."""
    share = result(found, "check_share")
    for name in ("ForeachSOAP", "ForeachPSGDKron"):
        record_property(name, share[name])
        print(f"{name}: state bytes per rank {', '.join(f'{x:.3f}' for x in share[name])} of one process")
        assert max(share[name]) <= 0.3
    total: dict[tuple[int, ...], int] = {}
    for seen in share["orthogonalized"]:
        for shape, k in seen.items():
            total[shape] = total.get(shape, 0) + k
    assert total == {(40, 16): 1 + 1, (48, 16): 6, (16, 16): 6, (64, 16): 6, (16, 64): 6}
    for seen in share["orthogonalized"]:
        assert all(k <= -(-total[shape] // WORLD) for shape, k in seen.items())


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSOAP", "ForeachPSGDKron"])
def test_a_checkpoint_of_two_ranks_loads_on_any_number(found, name):
    """By torch.distributed.checkpoint at 1, 2, 3 and 4, and from a torch.save of one process; then five more steps."""
    checked = {k: v for k, v in result(found, "check_checkpoints").items() if k.startswith(name)}
    assert_same(checked, [f"{name} at {n}" for n in (1, 2, 3, 4)] + [f"{name} of one process"])


def test_the_state_that_dcp_makes_by_a_step_of_its_own_moves_nothing(found):
    assert result(found, "check_nested_state_dict") == {"moved": 0.0, "error": 0.0}


def test_a_nan_on_one_rank_is_seen_by_all(found):
    checked = dict(result(found, "check_nonfinite"))
    messages = checked.pop("raise")
    assert messages == ["the gradient of params['10'] has an inf or NaN (nonfinite='raise')"] * WORLD
    assert_same(checked, [f"{p} Foreach{k}" for p in ("skip", "skip_leaf") for k in ("AdamW", "SOAP")] + ["transform"])


def test_a_gradient_on_some_ranks_only_raises_on_all(found):
    messages = result(found, "check_missing_gradient")
    assert messages == ["params['4'] has a gradient on 3 of 4 ranks: expected all or none"] * WORLD


def test_hessian_vector_products_travel(found):
    assert result(found, "check_curvature") == {"error": 0.0, "state": "same"}


def test_a_compiled_step_is_one_graph_for_all_steps(found):
    assert_same(result(found, "check_compiled"), ["ForeachAdamW", "ForeachMuon"])


@pytest.mark.parametrize("name", SOME)
def test_functional_updates_of_dtensors_are_those_of_one_process(found, name):
    """Updates and state, keys and shapes included, on 4 ranks; Muon and SOAP also on 2, SOAP on 2x2, cut both ways."""
    checked = result(found, "check_functional")
    mine = {k: errors for k, errors in checked.items() if k.startswith((f"{name} at", f"{name} on"))}
    assert len(mine) == {"soap": 3, "muon": 2}.get(name, 1)
    assert set(mine.values()) == {(0.0, 0.0)}


def test_norms_of_dtensors_are_summed_in_another_order(found):
    """A norm over shards: the one difference, of rounding."""
    checked = result(found, "check_functional")
    assert all(0 < error < 1e-6 for name in ("clipped at 4", "hyperball at 4") for error in checked[name])


def test_functional_state_goes_through_checkpoints(found):
    checked = result(found, "check_functional_checkpoints")
    assert checked == {f"{name} at {n}": (0.0, 0.0) for name in ("soap", "muon") for n in (1, 3, 4)}


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch 2.11 traces no question to a placement")
def test_functional_updates_of_dtensors_compile_to_one_graph(found):
    assert result(found, "check_functional_compiled") == {"adamw": (0.0, 0.0), "muon": (0.0, 0.0)}


def test_functional_errors_name_the_leaf(found):
    beside, split, curvature = result(found, "check_functional_errors")
    assert re.fullmatch(r"params\['b'\] is a plain tensor, expected a DTensor on .*, as other leaves", beside)
    assert re.match(r"the blocks of params\['a'\] in the stack '.*' are on ranks 0 and 1, expected all on one", split)
    assert curvature.startswith("curvature: got a function, expected None")


@pytest.mark.thorough
def test_everything_again_with_every_class(tmp_path):
    found, seconds = launched(tmp_path / "distributed", "thorough")
    print({k: round(s) for k, s in seconds.items()})
    for check in ("two_ranks", "hsdp", "tensor_parallel", "ddp"):
        assert_same(result(found, f"check_{check}"), CLASSES)
    checked = result(found, "check_checkpoints")
    assert_same(checked, [f"{k} {at}" for k in CLASSES for at in ("at 1", "at 2", "at 3", "at 4", "of one process")])
    assert_same(result(found, "check_compiled"), ["ForeachAdamW", "ForeachMuon", "ForeachSOAP", "ForeachPSGDKron"])
    errors = result(found, "check_functional")
    # Sums over shards, in another order: norms, and Prodigy's dot product with the way from the start.
    summed = {f"{name} at {n}" for name in ("clipped", "hyperball", "prodigy") for n in (2, 4)}
    assert {k for k, e in errors.items() if e != (0.0, 0.0)} == summed
    assert all(max(errors[k]) < 1e-5 for k in summed)
    assert len(errors) == 2 * len(RECIPES) + 1


# On paper.


class Cut:
    """A placement, as far as arithmetic goes."""

    def __init__(self, dim=None, split_factor=None):
        if dim is not None:
            self.dim = dim
        if split_factor is not None:
            self.split_factor = split_factor


WHOLE, ROWS, COLUMNS = Cut(), Cut(0), Cut(1)


def layer_shapes(layers=24, width=1024):
    """The matrices of a transformer."""
    each = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return {f"{i}.{j}": shape for i in range(layers) for j, shape in enumerate(each)}


@pytest.mark.parametrize(
    ("placements", "sizes"),
    [
        ((ROWS,), (4,)),
        ((WHOLE, ROWS), (2, 3)),
        ((ROWS, COLUMNS), (2, 2)),
        ((Cut(0, 2), ROWS), (3, 2)),
        ((ROWS, ROWS), (2, 2)),
    ],
)
@pytest.mark.parametrize("shape", [(7, 5), (1, 3), (12, 4), (0, 3)])
def test_blocks_are_a_partition(placements, sizes, shape):
    """Every entry is on exactly one rank, or on one rank for each place along a mesh dim that replicates."""
    ranks = on_paper(sizes)
    seen = torch.zeros(shape, dtype=torch.int64)
    for coordinate in ranks.coordinates:
        box(shape, placements, sizes, coordinate).of(seen).add_(1)
    copies = 1
    for p, n in zip(placements, sizes, strict=True):
        copies *= 1 if hasattr(p, "dim") else n
    assert (seen == copies).all()


def test_blocks_are_those_of_torch():
    """Against torch's own arithmetic, for every rank of a fake process group of 12."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in (0, 5, 11):
        torch.distributed.init_process_group("fake", rank=rank, world_size=12, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (3, 4))
            for placements in (
                [Shard(0), Shard(1)],
                [Shard(0), Shard(0)],
                [Replicate(), Shard(1)],
                [Shard(1), Replicate()],
            ):
                for shape in ((7, 9), (2, 3), (24, 8)):
                    whole = torch.arange(shape[0] * shape[1]).reshape(shape)
                    replicated = DTensor.from_local(whole, mesh, [Replicate(), Replicate()], run_check=False)
                    mine = box(shape, placements, (3, 4), tuple(mesh.get_coordinate()))
                    assert torch.equal(replicated.redistribute(placements=placements).to_local(), mine.of(whole))
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64, 512])
def test_owners_have_at_most_their_share_and_equal_work(world):
    shapes = layer_shapes()
    found = owners({k: cost(s) for k, s in shapes.items()}, shapes, world)
    for shape in set(shapes.values()):
        mine = [sum(found[k] == r and s == shape for k, s in shapes.items()) for r in range(world)]
        assert max(mine) <= -(-24 // world)
    work = [sum(cost(s) for k, s in shapes.items() if found[k] == r) for r in range(world)]
    assert max(work) <= sum(work) / world + max(map(cost, shapes.values()))  # by its last matrix over the mean


def test_the_table_of_the_page_is_computed():
    """Matrices, work, bytes and state for each rank, for up to 512 ranks, on paper."""
    shapes = layer_shapes()
    elements, mib = sum(m * n for m, n in shapes.values()), 4 / 2**20
    rows = re.findall(r"^\| (\d+) \|(.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(world) for world, _ in rows] == [1, 2, 8, 64, 512]
    for text, cells in rows:
        world = int(text)
        found = costs(shapes, world)
        assert sum(found.sent) == 3 * elements * (world - 1) // world  # so 3 mn (W - 1) / W^2 on average
        owner = owners({k: cost(s) for k, s in shapes.items()}, shapes, world)
        state = [0] * world
        for k, (m, n) in shapes.items():
            state[owner[k]] += 2 * (m * n + m * m + n * n)  # two moments, GG and Q on both sides
        values = (
            f"{max(found.owned)}",
            f"{max(found.work):.4f}",
            f"{max(found.sent) * mib:.1f}",
            f"{sum(found.sent) * mib / world:.1f}",
            f"{3 * elements * (world - 1) / world * mib:.0f}",
            f"{max(state) * mib:.0f}",
        )
        assert cells.strip() == " | ".join(values)


@pytest.mark.parametrize("rank", [0, 3, 511])
def test_a_rank_of_512_owns_its_share(rank):
    """A class on a fake process group of 512 ranks: what is built there is what arithmetic says, and no more."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shapes = {f"{i:02}": ((64, 32), (32, 32), (48, 64))[i % 3] for i in range(12)}
    owner = owners({k: cost(s) for k, s in shapes.items()}, shapes, 512)
    torch.distributed.init_process_group("fake", rank=rank, world_size=512, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (512,))
        rows = [torch.distributed.tensor.Shard(0)]
        params = []
        for shape in shapes.values():
            here = box(shape, rows, (512,), (rank,)).sizes
            params.append(torch.nn.Parameter(dtensor(torch.zeros(here), mesh, rows, shape)))
        optimizer = hbfunc.SOAP(zip(shapes, params, strict=True), lr=0.1)
        for p in params:
            p.grad = torch.zeros_like(p)
        (unit,) = optimizer._built(0, optimizer.param_groups[0])
        assert unit.owned == [k for k in shapes if owner[k] == rank]
        moments = 2 * sum(m * n + m * m + n * n for k, (m, n) in shapes.items() if owner[k] == rank)
        counts = 3 * len(unit.owned)
        assert optimizer.state_size() == 4 * moments + 8 * counts
    finally:
        torch.distributed.destroy_process_group()


def test_the_exchange_is_a_bijection_on_paper():
    """Every rank's messages, delivered by hand: owners get the whole tensors, and everyone its shards back."""
    sizes, shapes = (2, 3), {"a": (7, 5), "b": (1, 4), "c": (6, 6), "d": (5,), "e": ()}
    placed = {"a": (WHOLE, ROWS), "b": (ROWS, ROWS), "c": (ROWS, COLUMNS), "d": (ROWS, WHOLE), "e": (WHOLE, WHOLE)}
    specs = {k: Spec(shapes[k], placed[k], i % 6) for i, k in enumerate(shapes)}
    for k, spec in specs.items():
        ranks = on_paper(sizes)
        blocks = [ranks.box(spec, r) for r in range(6) if ranks.sends(spec, r)]
        seen = torch.zeros(shapes[k], dtype=torch.int64)
        for at in blocks:
            at.of(seen).add_(1)
        assert (seen == 1).all(), k


def test_a_torch_without_distributed_will_do(monkeypatch):
    """Where torch.distributed is not available, and nobody has imported DTensor, steps are what they are."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor")
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = hbfunc.Muon([p], lr=0.5)
    p.grad = torch.eye(3, 2)
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == [0]
    assert not torch.equal(p, torch.ones(3, 2))


def test_the_race_runs_on_two_ranks(tmp_path):
    """torchrun on the loopback: one table, and the scores of one process."""
    options = ["--optimizers", "adamw", "muon", "--lrs", "0.01", "--repeats", "1", "--steps", "20", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, "-m", "hbfunc.race", "--fsdp", *options, str(tmp_path / "2.json"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("best lr") == 1
    assert main([*options, str(tmp_path / "1.json"), "--out", str(tmp_path)]) == 0
    scores = [
        {r["optimizer"]: r["runs"][0]["scores"] for r in json.loads((tmp_path / f"{n}.json").read_text())["results"]}
        for n in (1, 2)
    ]
    assert list(scores[0]) == list(scores[1]) == ["adamw", "muon"]
    for name, expected in scores[0].items():
        assert scores[1][name] == pytest.approx(expected, abs=3 / 540), name  # three of the images


def test_the_race_says_how_it_is_started(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--fsdp"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "hbfunc.race: --fsdp needs torchrun: torchrun --nproc-per-node 2 -m hbfunc.race --fsdp\n"
    )
