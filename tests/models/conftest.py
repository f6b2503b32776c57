"""GPT-Js of transformers and their counterparts here."""

from __future__ import annotations

import pytest
import torch
from gptj_cases import SIZES, transformers_gptj

from limber_fast import GPTJ


@pytest.fixture(scope="session", params=list(SIZES))
def theirs(request):
    return transformers_gptj(request.param)


@pytest.fixture(scope="session")
def tiny():
    return transformers_gptj("tiny")


@pytest.fixture(scope="session")
def ours(theirs):
    return GPTJ.from_transformers(theirs, weights="float", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_ours(tiny):
    return GPTJ.from_transformers(tiny, weights="float", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_int8(tiny):
    return GPTJ.from_transformers(tiny, dtype=torch.float32)
