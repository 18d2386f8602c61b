"""What begins with an underscore is used by its own object, or inside its own module, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TORCH = frozenset(
    {
        # attributes of tensors, functions of the tape, modules and optimizers that have no public twin
        "_backward_hooks", "_buffers", "_compiled_call_impl", "_forward_hooks", "_forward_hooks_with_kwargs",
        "_fsdp_param_group", "_get_fsdp_state", "_input_metadata", "_join_config",
        "_optimizer_state_dict_post_hooks", "_parameters", "_reversed_padding_repeated_twice",
        "_saved_alpha", "_saved_mat2", "_state_ctx", "_version",
        # classes and functions of its modules
        "_BatchNorm", "_C", "_ConvNd", "_ConvTransposeNd", "_InstanceNorm", "_NormBase", "_conv_forward",
        "_amp_foreach_non_finite_check_and_unscale_", "_autograd", "_current_autograd_node", "_current_graph_task_id",
        "_current_level", "_dynamo", "_foreach_add_", "_foreach_copy_", "_foreach_lerp_", "_foreach_mul",
        "_foreach_mul_", "_foreach_norm", "_functorch", "_get_default_store", "_len_torch_function_stack",
        "_pop_torch_function_stack", "_saved_tensors_hooks_enable", "_saved_tensors_hooks_get_disabled_error_message",
        "_unsafe_preserve_version_counter", "_vmap", "_weight_norm", "_will_engine_execute_node",
    }
)  # fmt: skip
"""Names of PyTorch's own."""


def _private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private names of other objects and modules, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            owner = node.value
            if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
                continue
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if _private(alias.name))


@pytest.mark.parametrize("package", ["diagnostics", "hessopt"])
def test_private_names_stay_with_their_owners(package: str) -> None:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        for _, name in _used(ast.parse(path.read_text(encoding="utf-8"))):
            if name not in TORCH:
                found.setdefault(path.relative_to(ROOT).as_posix(), set()).add(name)
    assert not found


def test_what_counts_as_use() -> None:
    code = "self._a; cls._b; super()._c; x._d; self.y._e; x.__dict__; from m import _f, g; f()._g"
    assert {name for _, name in _used(ast.parse(code))} == {"_d", "_e", "_f", "_g"}
