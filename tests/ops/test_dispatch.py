"""Backend choice: precedence, refusals with reasons, and contexts of threads and tasks."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from limber_fast import BackendUnavailable, dispatch, info_nce, use_backend

TOWERS = torch.randn(2, 4, 3)


@pytest.fixture
def ran(monkeypatch):
    """Names of the backends that served calls, in order."""
    names, select = [], dispatch.select

    def record(*args):
        module = select(*args)
        names.append(module.__name__.rpartition(".")[2])
        return module

    monkeypatch.setattr(dispatch, "select", record)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    return names


def test_precedence(ran, monkeypatch):
    default = dispatch.explain("info_nce", "cpu")[0]
    ran.clear()
    info_nce(*TOWERS, 1.0)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "eager")
    info_nce(*TOWERS, 1.0)
    with use_backend("auto"):
        info_nce(*TOWERS, 1.0)
        with use_backend("eager"):
            info_nce(*TOWERS, 1.0)
            info_nce(*TOWERS, 1.0, backend=default)
    assert ran == [default, "eager", default, "eager", default]


def test_decorator(ran):
    @use_backend("eager")
    def step():
        return info_nce(*TOWERS, 1.0)

    step(), step(), info_nce(*TOWERS, 1.0)
    assert ran[:2] == ["eager", "eager"] and dispatch.preferred("auto") == "auto"


def test_backward_runs_where_forward_ran(ran):
    image = TOWERS[0].clone().requires_grad_()
    with use_backend("eager"):
        loss = info_nce(image, TOWERS[1], 1.0)
    loss.backward()
    assert ran == ["eager", "eager"]


def test_choice_belongs_to_its_thread_and_task():
    seen = {}

    def other_thread():
        seen["thread"] = dispatch.preferred("auto")

    async def task(name, started, go):
        with use_backend(name):
            started.set()
            await go.wait()
            seen[name] = dispatch.preferred("auto")

    async def two_tasks():
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("eager", first, second), task("cpu", second, first))

    with use_backend("triton"):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        asyncio.run(two_tasks())
    assert seen == {"thread": "auto", "eager": "eager", "cpu": "cpu"}


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_named_backend_never_falls_back(name):
    with pytest.raises(BackendUnavailable) as error:
        info_nce(*TOWERS, 1.0, backend=name)
    lines = str(error.value).splitlines()
    assert lines[0] == f"info_nce: backend '{name}' cannot run this call"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(dispatch.BACKENDS)
    assert "runs on cuda tensors; got cpu" in lines[1]
    assert lines[-1] == "  eager: can run this"


def test_reasons_of_a_native_module(monkeypatch):
    monkeypatch.setenv("LIMBER_FAST_CPU_ISA", "mmx")
    chosen, reasons = dispatch.explain("info_nce", "cpu")
    assert chosen == "eager" and "LIMBER_FAST_CPU_ISA must be one of" in reasons["cpu"]
    with pytest.raises(BackendUnavailable, match="cpu: LIMBER_FAST_CPU_ISA must be one of"):
        info_nce(*TOWERS, 1.0, backend="cpu")


def test_dtype_that_only_eager_takes(ran):
    info_nce(*TOWERS.double(), 1.0)
    assert ran == ["eager"]
    with pytest.raises(BackendUnavailable, match="float64"):
        info_nce(*TOWERS.double(), 1.0, backend="cpu")


def test_unknown_names(monkeypatch):
    choices = "must be one of 'auto', 'cuda', 'triton', 'cpu', 'eager'; got 'gpu'"
    with pytest.raises(ValueError, match=f"use_backend: name {choices}"):
        use_backend("gpu")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError, match=f"LIMBER_FAST_BACKEND {choices}"):
        info_nce(*TOWERS, 1.0)


def test_explain_names_every_refusal():
    for op in dispatch.OPS:
        chosen, reasons = dispatch.explain(op, torch.device("cpu"))
        assert chosen in ("cpu", "eager") and chosen not in reasons
        assert {"cuda", "triton"} <= set(reasons)
