"""Programs that people train with, the real ones, around the classes: the same numbers as a plain loop.

Needs the extra `programs`; without it these tests are skipped. Models are made on the spot, nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import hbfunc
from hbfunc import utils

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs: deprecations, missing loggers, few workers

Named = Iterable[tuple[str, torch.nn.Parameter]]
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda named, **options: hbfunc.AdamW(named, **{"lr": 0.02, **options}),
    "SOAP": lambda named, **options: hbfunc.SOAP(named, **{"lr": 0.02, "warmup_steps": 0, **options}),
    "Muon": lambda named, **options: hbfunc.Muon(named, **{"lr": 0.02, **options}),
    "SFAdamW": lambda named, **options: hbfunc.SFAdamW(named, **{"lr": 0.02, **options}),
    "MatricesTo": lambda named, **options: hbfunc.MatricesTo(
        named, hbfunc.muon(lr=0.02), rest=hbfunc.adamw(lr=0.01), **options
    ),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X.sin().sum(1), X.prod(1)], 1)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)
    monkeypatch.chdir(tmp_path)  # where some of them leave logs
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def program(name: str) -> Any:
    """A module of the extra, imported when a test first needs it: some take seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = "lightning" if name == "hbfunc.lightning" else name.partition(".")[0]
        pytest.importorskip(top, reason="pip install 'hbfunc[programs]'")
        return importlib.import_module(name)


def network(seed: int = 1, hidden: int = 0) -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        between = [layer for _ in range(hidden) for layer in (torch.nn.Linear(8, 8), torch.nn.Tanh())]
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), *between, torch.nn.Linear(8, 2))


def loss_of(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of 8, in order, over and over."""
    for t in range(steps):
        at = slice(8 * (t % 4), 8 * (t % 4) + 8)
        yield X[at], Y[at]


def values(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# -- Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning() -> Any:
    found = program("lightning.pytorch")
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return found


def lit(lightning: Any, name: str, scheduled: bool = False) -> Any:
    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = network(), []

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.seen.append(batch)
            return loss_of(self.net, *batch)

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", loss_of(self.net, *batch))

        def configure_optimizers(self) -> Any:
            optimizer = OPTIMIZERS[name](self.net.named_parameters())
            if not scheduled:
                return optimizer
            return [optimizer], [{"scheduler": halving(optimizer), "interval": "step"}]

    return Lit()


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, 2, 0.5)


def fit(lightning: Any, module: Any, steps: int, path: Any = None, validate: bool = False, **options: Any) -> Any:
    options = {"enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    trainer.fit(module, data, data if validate else None, ckpt_path=path)
    return trainer


def plain(
    name: str, data: Any, *, clip: float | None = None, parts: int = 1, low: bool = False, in_groups: bool = True
) -> list[Tensor]:
    """What a loop over these batches does, under a scheduler. in_groups: parameters are clipped in the order of the
    optimizer's groups, as Lightning does, and not in the model's: a norm is a sum, which is rounded."""
    model, data = network(), list(data)
    optimizer = OPTIMIZERS[name](model.named_parameters())
    scheduler = halving(optimizer)
    steps, data = len(data) // parts, iter(data)
    for _ in range(steps):
        for _ in range(parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = loss_of(model, *next(data))
            (loss / parts).backward()
        if clip is not None:
            grouped = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(grouped if in_groups else model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return values(model)


LIGHTNING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the Trainer, and of `plain`
    "plain": ({}, {}),
    "clipping": ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"parts": 2}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"low": True}),
    "16-mixed": ({"precision": "16-mixed"}, {"low": True}),  # on the CPU it takes bfloat16 instead
}


@pytest.mark.parametrize("options", LIGHTNING)
@every
def test_lightning_fits(lightning: Any, name: str, options: str) -> None:
    theirs, ours = LIGHTNING[options]
    module = lit(lightning, name, scheduled=True)
    trainer = fit(lightning, module, 6, **theirs)
    assert trainer.global_step == 6
    assert same(values(module.net), plain(name, batches(6 * ours.get("parts", 1)), **ours))


@every
def test_lightning_resumes(lightning: Any, name: str, tmp_path: Path) -> None:
    """Saved after an epoch of 4 steps, and gone on with for 3: the same bits as 7 at once."""
    first, second = (lit(lightning, name, scheduled=True) for _ in range(2))
    keep = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    fit(lightning, first, 4, enable_checkpointing=True, callbacks=[keep])
    trainer = fit(lightning, second, 7, path=tmp_path / "step=4.ckpt")
    assert trainer.global_step == 7
    assert same(values(first.net), plain(name, batches(4)))
    assert same(values(second.net), plain(name, first.seen + second.seen))  # which batch comes next is its affair


@every
def test_lightning_by_hand(lightning: Any, name: str) -> None:
    """Manual optimization, where Lightning wraps the optimizer."""

    class Manual(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = network(), False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, *batch))
            optimizer.step()
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            optimizer = OPTIMIZERS[name](self.net.named_parameters())
            return [optimizer], [halving(optimizer)]

    module = Manual()
    fit(lightning, module, 5)
    assert same(values(module.net), plain(name, batches(5)))


# -- Hugging Face's Trainer -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    found = program("transformers")
    found.logging.set_verbosity_error()
    return found


def language_model(transformers: Any) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
        config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        return transformers.LlamaForCausalLM(config)


TOKENS = torch.randint(32, (32, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": x, "labels": x} for x in TOKENS]


def hugging_face(transformers: Any, name: str, folder: Path, steps: int, **options: Any) -> Any:
    """A Trainer that has trained, on DATA in order, in the groups of `get_parameter_names`."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    path = options.pop("path", None)
    model = options.pop("model", None) or language_model(transformers)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**{**arguments, **options}),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        optimizers=decayed(name, model),
    )
    trainer.train(resume_from_checkpoint=path)
    return trainer


def decayed(name: str, model: Any) -> tuple[Any, Any]:
    """An optimizer with weight decay where Hugging Face has it, not on biases and norms, and a scheduler."""
    get_parameter_names = importlib.import_module("transformers.trainer_pt_utils").get_parameter_names
    names = set(get_parameter_names(model, [torch.nn.LayerNorm], ["bias", "norm"]))
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    groups: Any = [
        {"params": [(k, p) for k, p in named if k in names], "weight_decay": 0.1},
        {"params": [(k, p) for k, p in named if k not in names], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[name](named if name == "MatricesTo" else [group for group in groups if group["params"]])
    return optimizer, lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 5)


def by_loop(name: str, model: Any, steps: int, *, clip: float | None = None, parts: int = 1) -> list[Tensor]:
    model.train()
    optimizer, scheduler = decayed(name, model)
    for t in range(steps):
        for part in TOKENS[8 * (t % 4) : 8 * (t % 4) + 8].chunk(parts):
            model(input_ids=part, labels=part, num_items_in_batch=torch.tensor(8 * 7)).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return values(model)


HUGGING_FACE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipping": ({"max_grad_norm": 0.5}, {"clip": 0.5}),
    "accumulation": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {"parts": 2}),
}


@pytest.mark.parametrize("options", HUGGING_FACE)
@every
def test_hugging_face_trains(transformers: Any, name: str, options: str, tmp_path: Path) -> None:
    theirs, ours = HUGGING_FACE[options]
    trainer = hugging_face(transformers, name, tmp_path, 5, **theirs)
    assert trainer.state.global_step == 5
    assert same(values(trainer.model), by_loop(name, language_model(transformers), 5, **ours))


@every
def test_hugging_face_resumes(transformers: Any, name: str, tmp_path: Path) -> None:
    first = hugging_face(transformers, name, tmp_path, 3, save_strategy="steps", save_steps=3)
    second = hugging_face(transformers, name, tmp_path, 5, path=str(tmp_path / "checkpoint-3"))
    assert not same(values(first.model), values(second.model))
    assert same(values(second.model), by_loop(name, language_model(transformers), 5))


def test_hugging_face_evaluates_at_the_average(transformers: Any, tmp_path: Path) -> None:
    """It calls eval() and train() itself."""
    trainer = hugging_face(transformers, "SFAdamW", tmp_path, 4)
    before = values(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    optimizer = trainer.optimizer.optimizer
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    assert not same(values(trainer.model), before)
    batch = TOKENS[:8]
    assert trainer.model(input_ids=batch, labels=batch).loss.item() == pytest.approx(loss)
    optimizer.train()
    for p, q in zip(values(trainer.model), before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


SCHEDULES: dict[str, dict[str, Any]] = {  # what some of Hugging Face's need
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


@every
def test_hugging_faces_schedules(transformers: Any, name: str) -> None:
    """Every one of them: the rates that a torch.optim optimizer of the same groups gets, before every step."""
    kinds = [kind.value for kind in importlib.import_module("transformers.trainer_utils").SchedulerType]
    assert set(SCHEDULES) < set(kinds)
    for kind in kinds:
        model = network()
        optimizer = OPTIMIZERS[name](model.named_parameters())
        groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": g["lr"]} for g in optimizer.param_groups]
        reference = torch.optim.SGD(groups, lr=optimizer.defaults["lr"])
        options = {"num_warmup_steps": 2, "num_training_steps": 8, "scheduler_specific_kwargs": SCHEDULES.get(kind)}
        ours, theirs = (transformers.get_scheduler(kind, o, **options) for o in (optimizer, reference))
        for t, batch in enumerate(batches(6)):
            loss_of(model, *batch).backward()
            assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in reference.param_groups], kind
            optimizer.step()
            reference.step()
            for scheduler in (ours, theirs):
                scheduler.step(*([1.0 + t] if kind in ("reduce_lr_on_plateau", "greedy") else []))


# -- peft -----------------------------------------------------------------------------------------------------------


def adapted(transformers: Any, peft: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(language_model(transformers), config)


@every
def test_peft_adapts(transformers: Any, name: str, tmp_path: Path) -> None:
    """LoRA under Hugging Face's Trainer, the whole model handed to the optimizer: adapters move, the rest does not."""
    peft = program("peft")
    model, other = adapted(transformers, peft), adapted(transformers, peft)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = OPTIMIZERS[name](other.named_parameters())
    for t in range(3):
        part = TOKENS[8 * t : 8 * t + 8]
        other(input_ids=part, labels=part).loss.backward()
        optimizer.step()
    moved = {k for k, p in other.named_parameters() if not torch.equal(p, before[k])}
    assert moved == {k for k in before if "lora_" in k}
    assert all(p.requires_grad for p, entries in optimizer.state.items() if entries)
    hugging_face(transformers, name, tmp_path, 3, model=model).model.save_pretrained(tmp_path / "adapter")
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == {k for k in before if "lora_" in k}
    again = peft.PeftModel.from_pretrained(language_model(transformers), str(tmp_path / "adapter"))
    assert same(values(again), values(model))


# -- Accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
@every
def test_accelerate_accumulates_clips_and_resumes(name: str, low: bool, tmp_path: Path) -> None:
    accelerate = program("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    options = {"mixed_precision": "bf16"} if low else {}
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    model = network()
    optimizer = OPTIMIZERS[name](model.named_parameters())
    wrapped, prepared, scheduler = accelerator.prepare(model, optimizer, halving(optimizer))

    def run(data: Any) -> list[Tensor]:
        for x, y in data:
            with accelerator.accumulate(wrapped):
                accelerator.backward((wrapped(x) - y).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
        return values(model)

    data = list(batches(12))
    run(data[:6])
    accelerator.save_state(str(tmp_path))
    straight = run(data[6:])
    accelerator.load_state(str(tmp_path))
    assert same(run(data[6:]), straight)
    accelerate.state.AcceleratorState._reset_state(True)
    if not low:  # there the outputs are cast to float32, and a plain loop is not bit for bit the same
        assert same(straight, plain(name, data, clip=0.5, parts=2, in_groups=False))


# -- timm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm's optimizers and schedulers. Its models need a torchvision, for which torch's CPU builds have none on PyPI:
    without, its packages are entered from the side."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("pip install --no-deps timm")
    before = set(sys.modules)
    shell, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    shell.__path__ = list(spec.submodule_search_locations or [])
    models.__dict__["group_parameters"] = None  # for models with a `group_matcher`, such as its own
    sys.modules |= {"timm": shell, "timm.models": models}
    try:
        yield types.SimpleNamespace(
            optim=importlib.import_module("timm.optim"), scheduler=importlib.import_module("timm.scheduler")
        )
    finally:
        for module in set(sys.modules) - before:
            if module.partition(".")[0] == "timm":
                del sys.modules[module]


@pytest.mark.parametrize("name", ["AdamW", "SOAP", "Muon", "SFAdamW"])
def test_timm_creates_optimizers(timm: Any, name: str) -> None:
    """By name, from its registry, with its groups (weight decay, layer-wise rates) and a scheduler of its own."""
    info = timm.optim.OptimInfo(name=f"hb{name.lower()}", opt_class=getattr(hbfunc, name), has_betas=True)
    timm.optim._optim_factory.default_registry.register(info)
    for options in ({"weight_decay": 0.1}, {"weight_decay": 0.1, "layer_decay": 0.5}):
        model, other = network(hidden=6), network(hidden=6)
        model.pretrained_cfg = {"classifier": "14"}  # its name of the head, for the rates of layers
        optimizer = timm.optim.create_optimizer_v2(model, info.name, lr=0.02, betas=(0.8, 0.9), **options)
        assert type(optimizer) is getattr(hbfunc, name)
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
        scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=6, warmup_t=2, t_in_epochs=False)
        scales = [g.get("lr_scale", 1.0) for g in optimizer.param_groups]
        assert (len(set(scales)) > 1) == ("layer_decay" in options)
        by_tensor = {id(p): i for i, p in enumerate(model.parameters())}
        others = list(other.parameters())
        groups = [
            {"params": [others[by_tensor[id(p)]] for p in g["params"]], "weight_decay": g["weight_decay"]}
            for g in optimizer.param_groups
        ]
        reference = getattr(hbfunc, name)(groups, betas=(0.8, 0.9))
        for t, batch in enumerate(batches(5)):
            for group, held in zip(optimizer.param_groups, reference.param_groups, strict=True):
                held["lr"] = group["lr"]
            for net, o in ((model, optimizer), (other, reference)):
                loss_of(net, *batch).backward()
                o.step()
            scheduler.step_update(t + 1)
        assert same(model.parameters(), other.parameters())


def look_ahead(timm: Any, name: str) -> tuple[Any, Any]:
    model = network()
    return model, timm.optim.Lookahead(OPTIMIZERS[name](model.named_parameters(), consume_grad=False), alpha=0.5, k=2)


def stepped(model: Any, optimizer: Any, data: Any) -> list[Tensor]:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, *batch).backward()
        optimizer.step()
    return values(model)


@every
def test_timms_lookahead(timm: Any, name: str) -> None:
    """It looks at the gradients after the step: with consume_grad=False it finds them, and its slow weights move."""
    found = stepped(*look_ahead(timm, name), batches(8))
    model, slow = network(), None
    inner = OPTIMIZERS[name](model.named_parameters())
    for t, batch in enumerate(batches(8), 1):
        stepped(model, inner, [batch])
        if t % 2 == 0:
            fast = values(model)
            slow = fast if slow is None else [s + 0.5 * (f - s) for s, f in zip(slow, fast, strict=True)]
            with torch.no_grad():
                for p, s in zip(model.parameters(), slow, strict=True):
                    p.copy_(s)
    for p, q in zip(found, values(model), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    alone = network()
    without = stepped(alone, OPTIMIZERS[name](alone.named_parameters()), batches(8))
    assert not same(without, found)


@every
def test_timms_lookahead_resumes(timm: Any, name: str, tmp_path: Path) -> None:
    """Its slow weights are entries of the optimizer's state: saved, loaded and gone on with."""
    data = list(batches(10))
    (model, optimizer), (other, again) = look_ahead(timm, name), look_ahead(timm, name)
    stepped(model, optimizer, data[:6])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "held.pt")
    held = torch.load(tmp_path / "held.pt", weights_only=True)
    other.load_state_dict(held["model"])
    again.load_state_dict(held["optimizer"])
    assert same(stepped(other, again, data[6:]), stepped(model, optimizer, data[6:]))


# -- torch.distributed.checkpoint -----------------------------------------------------------------------------------


@every
def test_distributed_checkpoints(name: str, tmp_path: Path) -> None:
    """Model and optimizer, through a folder on disk and back, in the way of its tutorial."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = network(), network(seed=7)
    optimizer = OPTIMIZERS[name](model.named_parameters())
    restored = OPTIMIZERS[name](other.named_parameters())
    data = list(batches(7))

    def run(net: torch.nn.Module, o: Any, part: Any) -> list[Tensor]:
        for batch in part:
            loss_of(net, *batch).backward()
            o.step()
        return values(net)

    run(model, optimizer, data[:4])
    held, entries = get_state_dict(model, optimizer)
    dcp.save({"model": held, "optimizer": entries}, checkpoint_id=tmp_path)
    weights, state = get_state_dict(other, restored)
    found = {"model": weights, "optimizer": state}
    dcp.load(found, checkpoint_id=tmp_path)
    set_state_dict(other, restored, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    assert same(run(other, restored, data[4:]), run(model, optimizer, data[4:]))
