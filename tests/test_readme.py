"""What the documents say is so: snippets run, links lead somewhere, variables exist, messages are those of the code."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for pattern in (
        "setup.py",
        "danet_kernels/**/*.py",
        "build_backend/*.py",
        "csrc/**/*.cpp",
        "csrc/**/*.h",
        ".ci/run",
    )
    for path in sorted(ROOT.glob(pattern))
]
for_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("name", ["README.md", "docs/troubleshooting.md"])  # test_math.py runs those of the others
def test_python_blocks_run(name):
    found = blocks(ROOT / name, "python")
    assert found
    namespace = {}
    for index, block in enumerate(found):
        exec(compile(block, f"{name}, block {index}", "exec"), namespace)
    if name == "README.md":
        assert namespace["features"].grad.shape == namespace["features"].shape
        assert namespace["rows"].shape == (1, 2, 64, 64)
        torch.testing.assert_close(namespace["rows"].sum((2, 3)), torch.ones(1, 2))


def test_python_blocks_of_the_guide_to_swap_run():
    """Those that import the projects it is about are compiled only."""
    namespace, ran = {}, 0
    for index, block in enumerate(blocks(ROOT / "docs/swap.md", "python")):
        code = compile(block, f"docs/swap.md, block {index}", "exec")
        if not re.search(r"^from (encoding|mmseg|mmengine|core|pytorchcv|ssseg)\b", block, re.M):
            exec(code, namespace)
            ran += 1
    assert ran == 3
    assert namespace["logits"].shape == (1, 19, 65, 97)
    assert [one.op for one in namespace["report"].swapped] == ["position_attention"]


@for_each_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_the_map_of_the_tree_is_right():
    tree = next(block for block in blocks(ROOT / "README.md", "text") if "reference.py" in block)
    for line in tree.splitlines():
        first, _, rest = line.partition(" ")
        assert (ROOT / first).exists(), first
        for name in re.findall(r"[\w/]+\.(?:py|cpp|md)\b|\w+/", rest):
            assert (ROOT / first / name).exists(), f"{first}{name}"


def test_variables_are_documented_and_exist():
    code = {name for path in SOURCES for name in re.findall(r'"(DANET_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    for document in DOCUMENTS:
        assert set(re.findall(r"\bDANET_[A-Z_]+\b", document.read_text(encoding="utf-8"))) <= code, document.name
    missing = {name for name in code if f"`{name}`" not in (ROOT / "README.md").read_text(encoding="utf-8")}
    assert not missing, f"README.md does not mention {missing}"


def test_troubleshooting_quotes_our_own_messages():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    ours = text.partition("## From torch")[0]
    headings = re.findall(r"^### `(.+)`$", ours, re.M)
    assert len(headings) > 10
    # Adjacent string literals are one message, however the lines are broken.
    code = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in SOURCES)
    for heading in headings:
        if heading.startswith("module 'danet_kernels._C'"):
            continue  # Python's
        for fragment in heading.split("…"):
            assert fragment.strip() in code, f"nothing says {fragment!r}"
