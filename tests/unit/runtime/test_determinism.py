"""Torch's strict mode is on while gradients are computed, and only then. Its effect on a GPU: benchmarks/results."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.errors import UserError
from pipeline.runtime.determinism import WORKSPACE, deterministic_kernels, fix_workspace


def is_strict() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def test_strict_inside_the_block_and_restored_after_it():
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic_kernels(True):
        assert is_strict()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        with deterministic_kernels(True):  # activation checkpointing runs the student again inside backward
            assert is_strict()
        assert is_strict()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills


def test_the_settings_of_the_caller_are_restored():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(True):
            assert is_strict()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_disabled_changes_nothing():
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_kernel_names_the_setting():
    target, index = torch.zeros(4), torch.tensor([0, 0, 1])
    with pytest.raises(UserError, match=r"cannot be trained with the same bits.*--set deterministic=false"):
        with deterministic_kernels(True):
            target.put_(index, torch.ones(3))  # one of the few operations that are not deterministic on a CPU either
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="shapes"):
        with deterministic_kernels(True):
            torch.ones(2, 3) @ torch.ones(2, 3)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_workspace_is_a_reproducible_one(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    fix_workspace()
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    fix_workspace()
    assert os.environ[WORKSPACE] == ":16:8"


def test_another_workspace_is_an_error_with_its_name(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match=f"unset {WORKSPACE}"):
        fix_workspace()
