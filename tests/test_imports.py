"""No file imports itself in a circle, not even inside a function; the method stands on the network alone."""

import ast
from pathlib import Path

import distill

ROOT = Path(distill.__file__).parent


def arrows(root: Path) -> dict[str, set[str]]:
    """{file: the files of this project that it imports, in functions, too}, of everything but tests."""
    files = {file.relative_to(root).as_posix() for file in root.rglob("*.py")}
    files = {file for file in files if not file.startswith(("tests/", ".")) and "/." not in file}
    found = {}
    for file in files:
        names = set()
        for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[file] = {f"{name.replace('.', '/')}.py" for name in names} & files
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files each of which leads, arrow by arrow, to every other."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for file in graph[waiting.pop()] - seen:
                seen.add(file)
                waiting.append(file)
        return seen

    reach = {file: reached(file) for file in graph}
    inside = {
        file: sorted(f for f in reach[file] if file in reach[f]) for file in graph if file in reach[file]
    }
    return sorted({tuple(group): group for group in inside.values()}.values())


def test_no_circle():
    assert circles(arrows(ROOT)) == []


def test_the_method_stands_on_nothing_but_the_networks():
    graph = arrows(ROOT)
    assert graph["moe.py"] == graph["siglip.py"] == graph["controls.py"] == set()
    assert graph["qwen.py"] == {"moe.py"} and graph["distill.py"] == {"qwen.py", "controls.py"}
    assert graph["lean.py"] == {"qwen.py", "distill.py", "controls.py"}
    assert graph["rivals.py"] == {"qwen.py", "distill.py", "lean.py"}
    above = {"train.py", "eval.py", "tiny/__main__.py"}  # programs: nothing but programs imports them
    for file, imported in graph.items():
        assert not imported & above or file.startswith(("tiny/", "bench/")), (file, imported & above)


def test_a_circle_is_seen(tmp_path):
    """Through three files and inside a function; a file that leads into it is no part of it."""
    texts = {
        "a": "import part.b",
        "part/b": "def f():\n    from c import x",
        "c": "if 1:\n    import a",
        "d": "import a",
    }
    for name, text in texts.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert circles(arrows(tmp_path)) == [["a.py", "c.py", "part/b.py"]]
