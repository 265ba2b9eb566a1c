"""The house's own rules: imports point down, the core stands alone, annotations of shapes are true."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).resolve().parents[1] / "maskattn"
FLOORS = [
    {
        "errors",
        "leaves",
        "files",
        "first_use",
        "lettering",
        "png_files",
        "mask_images",
        "packing",
        "native_packing",
        "shapes",
        "options",
        "operands",
        "results",
        "dropout",
        "kernels",
        "extension",
        "large_results",
        "_native",
    },
    {"attention"},
    {"distributed"},
    {"nn"},
    {"explain"},
    {"slide"},
    {"evaluation"},
    {"training"},
    {"cli", "doctor", "demo", "viewer", "__main__"},
]
OPTIONAL = (
    "triton openslide timm transformers captum cv2 tifffile h5py shapely PIL matplotlib typer rich safetensors "
    "jaxtyping"
)


def floor_of(room: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def imported_names(path: Path) -> set[str]:
    """Every module, and every name of one, that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_rooms(path: Path) -> set[str]:
    known = {room for rooms in FLOORS for room in rooms}
    rooms = {name.split(".")[1] for name in imported_names(path) if name.startswith("maskattn.")}
    return rooms & known


def test_every_module_has_a_floor_and_imports_only_downwards():
    arrows = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imported_rooms(path) - {room}:
            arrows += 1
            assert floor_of(other) <= floor_of(room), f"{path.relative_to(PACKAGE)} imports {other}, a floor above"
            upper = floor_of(room)
            assert upper in (0, len(FLOORS) - 1) or floor_of(other) < upper, (
                f"{path.relative_to(PACKAGE)} imports beside itself"
            )
    assert arrows > 20


def test_implementations_have_the_names_of_impl_and_import_nothing_from_one_another():
    from maskattn.attention.implementation import IMPLS

    home = PACKAGE / "attention" / "impl"
    found = {path.stem for path in home.iterdir() if path.stem not in ("__init__", "__pycache__")}
    assert found == set(IMPLS)
    files = 0
    for impl in found:
        for path in (home / impl).rglob("*.py") if (home / impl).is_dir() else [home / f"{impl}.py"]:
            files += 1
            others = {x for x in imported_names(path) if x.startswith("maskattn.attention.impl")}
            allowed = f"maskattn.attention.impl.{impl}"
            strange = [x for x in others if x != allowed and not x.startswith(f"{allowed}.")]
            assert not strange, f"{path.relative_to(PACKAGE)} imports {strange}"
            if impl != "reference":
                assert not [x for x in imported_names(path) if x.startswith("maskattn.attention.reference")]
    assert files >= len(IMPLS)


def test_the_specification_shares_with_what_it_judges_only_what_it_is_given():
    shared = {
        name.split(".")[1] for name in imported_names(PACKAGE / "attention" / "reference.py") if "maskattn" in name
    }
    assert shared == {"options", "dropout"}


CORE = """
import torch, maskattn, maskattn.nn, maskattn.explain
vit = maskattn.nn.VisionTransformer(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=2)
keep = torch.tensor([[True, False, False, True]])
vit(torch.randn(1, 3, 32, 32), keep).sum().backward()
print(tuple(maskattn.explain.CDAM(vit).attribute(torch.randn(1, 3, 32, 32), "all", keep).shape))
"""


def run_core(before: str) -> None:
    result = subprocess.run([sys.executable, "-c", before + CORE], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 2, 2, 2)"


def test_the_core_works_where_nothing_optional_is_installed():
    run_core(f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
""")


def test_the_core_works_where_the_extension_was_not_built():
    run_core("""
import sys
sys.modules["maskattn._native"] = None
import torch, maskattn
keep = torch.rand(1, 4096) > 0.5
packing, x = maskattn.Packing.from_keep(keep), torch.randn(1, 4096, 384)
assert not maskattn.packing.has_extension()
assert torch.equal(maskattn.unpack(maskattn.pack(x, packing), packing), x * keep[..., None])
""")


@pytest.mark.parametrize("folder", ["maskattn", "tests", "bench"])
def test_files_stay_small_enough_to_read(folder):
    lines = {path: len(path.read_text().splitlines()) for path in (PACKAGE.parent / folder).rglob("*.py")}
    assert lines
    assert {str(path): count for path, count in lines.items() if count > 400} == {}


def exported_by(tree: ast.Module) -> set[str] | None:
    """What a module's ``__all__`` names; None where it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def test_what_one_module_takes_from_another_is_in_its_all():
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text())
    taken, hidden = 0, []
    for taker, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module not in trees:
                continue
            exported = exported_by(trees[node.module]) or set()
            names = [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in trees]
            taken += len(names)
            hidden += [f"{taker} takes {node.module}.{name}" for name in names if name not in exported]
    assert hidden == []
    assert taken > 200


def test_what_a_module_says_it_exports_is_there():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        exported = exported_by(tree)
        if exported is None:
            continue
        defined = {
            alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
        }
        defined |= {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert exported <= defined, (
            f"{path.relative_to(PACKAGE)} exports {exported - defined}, which it does not define"
        )


def test_annotated_shapes_are_checked_and_true():
    jaxtyping, beartype = pytest.importorskip("jaxtyping"), pytest.importorskip("beartype")
    import maskattn
    from maskattn.nn import VisionTransformer
    from maskattn.nn.positions import resample_position_embedding

    def checked(function):
        # The function itself: the annotations of what torch.fx takes as one node resolve in its own module alone.
        return jaxtyping.jaxtyped(typechecker=beartype.beartype)(inspect.unwrap(function))

    keep = torch.tensor([[True, False, True], [True, True, True]])
    packing = checked(maskattn.Packing.from_keep.__func__)(maskattn.Packing, keep)
    x = checked(maskattn.pack)(torch.randn(2, 3, 2, 16), packing)
    lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
    out, lse = checked(maskattn.packed_attention)(x, x, x, *lengths, return_lse=True)
    assert (out.shape, lse.shape) == ((5, 2, 16), (2, 5))
    checked(maskattn.unpack)(out, packing)
    dense = torch.randn(2, 2, 3, 16)
    checked(maskattn.masked_attention)(dense, dense, dense, keep)
    checked(maskattn.readout)(torch.randn(2, 1, 2, 16), x, x, packing.cu_seqlens, 3, return_rows=True)
    checked(resample_position_embedding)(torch.randn(1, 4, 8), (2, 2), (3, 3), "timm")
    vit = VisionTransformer(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=2)
    checked(VisionTransformer.forward)(vit, torch.randn(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(maskattn.unpack)(out, packing.indices)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(resample_position_embedding)(torch.randn(4, 8), (2, 2), (3, 3), "timm")


def test_no_two_files_of_tests_have_one_name():
    """pytest would import the second as the first."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
