"""Every network that is trained, under glibc's heap checker: no kernel writes beyond its memory or reads unset memory.

Run as a program this file trains the networks that it reads as JSON. The checker marks the byte after each piece of
memory and aborts when a piece is freed whose mark is gone; new memory is filled with 0x5A, which is 1.5e16 as a float
or bfloat16, so that a gradient made from memory that nobody set is far off.
"""

import copy
import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace

import pytest
import torch
from torch import nn

from labelaug import models, studies, trials
from labelaug.training.deep import DeepSetting, autocast, gather, one_core, train
from labelaug.trials import Images, Network, Prepared, Trial

CHECKER = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165", "LD_PRELOAD": "libc_malloc_debug.so.0"}
OVERRUN = "import ctypes, torch; x = torch.ones(100, dtype=torch.uint8); "
OVERRUN += "ctypes.c_ubyte.from_address(x.data_ptr() + 100).value ^= 1; del x"


@dataclass(frozen=True)
class Case:
    """A network, the images it gets, and the sizes of its minibatches."""

    architecture: str
    width: int
    channels: int = 3
    side: int = 8
    precision: str = "float32"
    batch: int = 20
    last: int = 2


def of_trial(trial: Trial) -> Case:
    """Of the small scales as they are; of the large ones the full width on few and small images."""
    images, setting = trial.images, trial.setting
    kind = trial.network.architecture, trial.network.width
    channels = {"digits": 1, "fashion-mnist": 1}.get(images.name, 3)
    if kind[1] == 64:
        return Case(*kind, channels, 32 if kind[0] == "vgg16" else 8, setting.precision, 2, 2)
    n = 10 * round(images.fraction * {**studies.SMALLEST_CLASS, "digits": 139}[images.name])
    side = images.side or {"digits": 8, "fashion-mnist": 28}.get(images.name, 32)
    batch = min(setting.batch_size, n)
    return Case(*kind, channels, side, setting.precision, batch, n % batch or batch)


def cases() -> list[Case]:
    """Of every study at every scale, their teachers too; and the narrow ones of tests and sections."""
    found = set()
    for study in studies.STUDIES.values():
        of_study = []
        for scale in studies.SCALES:
            with suppress(ValueError):  # a study need not have every scale
                of_study += study(scale)
        assert of_study
        found |= {of_trial(trial) for trial in [*of_study, *(t.teacher for t in of_study if t.teacher)]}
    found |= {replace(case, precision=precision) for case in found for precision in ("float32", "bfloat16")}
    for precision in ("float32", "bfloat16"):
        found |= {Case(f"resnet{depth}", 4, 3, side, precision) for depth in (18, 50) for side in (1, 2, 3, 4)}
        for width in (1, 2, 4, 6):
            found |= {Case("resnet18", width, channels, 8, precision) for channels in (1, 2, 3)}
            found |= {Case(f"resnet{depth}", width, 3, 8, precision, 8) for depth in (34, 50)}
        found |= {Case("resnet101", 2, 3, 8, precision, 8), Case("resnet50", 8, 3, 8, precision, 6)}
        found |= {Case("vgg16", width, channels, 32, precision, 4) for width in (2, 8) for channels in (1, 3)}
        found |= {Case("mlp", width, 1, 8, precision) for width in (5, 64)}
    return sorted(found, key=astuple)


def environment(isa: str | None) -> dict[str, str]:
    capped = {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    kept = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    return kept | CHECKER | capped | {"OMP_NUM_THREADS": "1"}


def checked(chosen: list[Case], isa: str | None, *, strided: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, *(["strided"] if strided else [])]
    text = json.dumps([asdict(case) for case in chosen])
    return subprocess.run(command, input=text, env=environment(isa), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def checker():
    """The checker sees one byte too many behind a tensor of 100 (malloc gives more, so nothing else would see it)."""
    run = subprocess.run([sys.executable, "-c", OVERRUN], env=environment(None), capture_output=True, text=True)
    if run.returncode != -signal.SIGABRT:
        reason = f"glibc's heap checker is not on this machine: {run.stderr.strip()[:200]}"
        (pytest.fail if os.environ.get("CI") and sys.platform == "linux" else pytest.skip)(reason)
    plain = {name: value for name, value in environment(None).items() if name not in CHECKER}
    assert subprocess.run([sys.executable, "-c", OVERRUN], env=plain).returncode == 0


@pytest.mark.parametrize("isa", ["AVX2", None])
def test_nothing_is_overrun_and_gradients_are_those_of_contiguous_float64(checker, isa):
    """Under the kernels of processors with AVX2 and nothing newer, and under those of this one."""
    chosen = cases()
    run = checked(chosen, isa)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"{run.returncode} in {lines[-1:]}: {run.stderr[-2000:]}"
    assert len(lines) == len(chosen) > 50


def test_a_strided_convolution_is_caught(checker):
    """The control: with the stride in the 1×1 convolution the first network aborts, or its gradients are wrong."""
    if platform.machine() != "x86_64":
        pytest.skip("only x86 processors have these kernels")
    run = checked([Case("resnet18", 4, batch=20)], "AVX2", strided=True)
    assert run.returncode == -signal.SIGABRT or "AssertionError: gradient" in run.stderr, run.stderr[-2000:]


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16"])
def test_the_strided_convolutions_of_committed_trainings_are_right(checker, isa):
    """Eight channels, in minibatches of 100 and 50 images, with the stride in the convolution as it was then.

    A processor takes the widest instructions that it has of those allowed. AMX is not among them.
    """
    kinds = [Case("resnet18", 8, 3, 16, precision, 100, 50) for precision in ("float32", "bfloat16")]
    run = checked(kinds, isa, strided=True)
    assert run.returncode == 0, f"{run.returncode} in {run.stdout.splitlines()[-1:]}: {run.stderr[-2000:]}"


def check(case: Case, strided: bool, known: set) -> float:
    """Train an epoch of two minibatches; the largest relative error of outputs and gradients of its convolutions.

    Those in ``known`` are left out, and others go there: networks share many.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch + case.last, case.channels, case.side, case.side)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(x)) % 3
    # So small a rate that a deep network stays where it is: two images give it gradients of 1e7 and more.
    setting = DeepSetting(1e-9, 1, case.batch, optimiser="sgd", momentum=0.9, precision=case.precision)
    trial = Trial(Images("digits"), Network(case.architecture, case.width), setting, 0)
    data = Prepared({"train": (x, labels)}, 3, torch.full((case.channels,), 128.0), torch.full((case.channels,), 74.0))
    model = trials._build(trial, data)
    for layer in model.modules():
        if strided and isinstance(layer, models._Shortcut):
            layer[0].stride, layer.stride = (layer.stride, layer.stride), 1
    calls = {}

    def keep(layer, inputs, output):
        name = f"{layer} {case.precision} {inputs[0].dtype} {list(inputs[0].shape)}"
        if layer.training and name not in known:
            calls[name] = layer, inputs[0].detach(), output.shape

    hooks = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    everything = gather(x.permute(0, 2, 3, 1), torch.arange(len(x)))

    def measure(model):
        return {"train": {"sum": model(everything).sum()}}

    frame = train(model, x, labels, setting=setting, seed=0, measure=measure)
    assert not frame.query("metric == 'diverged'")["value"].any()
    for hook in hooks:
        hook.remove()
    known.update(calls)
    return max((error(*call, case.precision, generator) for call in calls.values()), default=0.0)


def error(layer: nn.Conv2d, like, shape, precision: str, generator) -> float:
    """Of the layer in channels_last against itself in contiguous float64, at random inputs of the shape it gets."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x = torch.randn(like.shape, generator=generator).to(like.dtype).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(shape, generator=generator).to(kind).contiguous(memory_format=torch.channels_last)
    with autocast(precision, x.device):
        found = applied(layer, x, weights)
    exact = copy.deepcopy(layer).double()
    for parameter in exact.parameters():
        parameter.data = parameter.data.to(kind).double().contiguous()
    expected = applied(exact, x.to(kind).double().contiguous(), weights.double().contiguous())
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    # Of sums that are rounded to 2^-24, and of sums in float32 of some blocks of products that are rounded to 2^-9.
    assert worst <= {"float32": 1e-5, "bfloat16": 5e-2}[precision], f"gradient: {worst:.1e} in {layer} at {x.shape}"
    return worst


def applied(layer, x, weights) -> list:
    x = x.detach().requires_grad_()
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], weights)]


if __name__ == "__main__":
    known: set[str] = set()
    with one_core(torch.device("cpu")):
        for case in json.load(sys.stdin):
            print(*case.values(), end=" ", flush=True)
            print(f"{check(Case(**case), 'strided' in sys.argv, known):.1e}", flush=True)
