"""The rooms: imports run flows → backends → kl, and from higher to lower inside each; light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

ROOMS = ("kl", "backends", "flows")

# From the bottom up. A line is a folder and its modules, by floors between slashes: a module imports from lower floors
# only, and modules of one floor know nothing of each other. An __init__ has a floor if it imports anything.
FLOORS = """
kl                      pieces records signs / columns text_tokens / scores
kl.input                hidden problems / logprobs prompts texts writer / contents / documents
kl.input.shapes         requests / completions gemini outputs rows / answers
kl.input                appended / sources / responses / conversion
kl.estimators           rows token_bytes / token_keys / list_checks
kl.estimators.matching  aligned rows texts / codes / padded places / evidence trust
kl.estimators           align
kl.estimators           bounds censored diagnostic entropy / divergence outliers / comparison
kl.tables               context_counts schemas / totals / responses / pairs / candidates outliers / repeats tokens
kl.tables               first_lists spreads
kl.statistics           intervals / canary drift / clusters position_sampling / breakdowns figures paired
kl.statistics           noise_floor ranking / summary / alarms / dataset
kl.output               room / atomic digits / kl_json / files glance headline
kl.output.report.drawing scales svg / axes
kl.output.report        comparisons markup movers selection spread verdict visible / charts lists payload sections
kl.finished             names lists shown worst / between run / reading
kl.output.report        page

backends                errors extras hookspecs settings / asked / base builtin keys / registry session
backends.storage        parallel / locations / remote / files / copies lease listing matching / __init__
backends.scores         rows / chunk_log damage / lines parts raw_log / index journal / aside / store
backends.contract       subject / setup / answers / calls / __init__
backends.files          contexts index / backend
backends.local          gguf / config tokenizer blas / candidates contexts rows / engine / models units
backends.local          jobs sampling / work / backend
backends.transformers   options reduction / checkpoints / tokens / loading / passes / work / sampling / backend
backends.service        bought counting merging proxies retry / breaker / limit
backends.openai_compatible client presets / answers found server vocabulary / asking options
backends.openai_compatible proofs wanted / scoring / sampling / backend
backends.vertex         status / wire / answers prices / samples options
backends.vertex.service access_token setup / retry model_calls / calls client
backends.vertex.jobs    bucket / remote / ledger
backends.vertex         gemini
backends.vertex.jobs    rows waves / work / rounds
backends.vertex         online / batch
backends.vertex.cleaning inventory / lifecycle / cleaner

flows.runtime           environment server terminal / logs progress
flows.config            catalogue form groups runner / reading templates
flows.folder            output
flows.cluster           mapping preload / runners / workers
flows.config            alert / models / backend sampling / cleaning
flows.folder            room layout / finished lock / members refusals
flows.config            folders / submitted / comparison
flows.folder            answers / vocabularies
flows.runtime           interrupts / hooks
flows.watch             markdown spending / naming report / page / artifacts / history / events reference / verdict
flows.watch             canary / ending
flows.stages            inputs / scoring / measuring plan reuse / dry_run first_lists passes pending prompts scorers
flows.stages            open_run writing / tasks
flows.sampling          prompts state / files / plan / identity / asking
flows.commands          texts / arguments / backends convert positions sample / csv_files report_file tables two_runs
flows.commands          many_runs figures run notify
flows.doors             backends init tokenkl
flows                   checkout notify / convert sample / analyze clean / run / pipeline
"""

MOST_FILES, MOST_FOLDERS = 10, 9  # of a room, when it is opened
MOST_FILES_INSIDE = 14


def modules() -> dict[str, Path]:
    """Every module of the three rooms, by its name."""
    files = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = modules()


def floors() -> dict[str, int]:
    """The number of each module's floor."""
    found: dict[str, int] = {}
    for line in FLOORS.strip().splitlines():
        if not line:
            continue
        folder, _, text = line.partition(" ")
        for number, floor in enumerate(text.split("/"), start=1 + max(found.values(), default=0)):
            for name in floor.split():
                module = f"{folder}.{name}".removesuffix(".__init__")
                assert module not in found, f"{module} has two floors"
                found[module] = number
    return found


class _Imports(ast.NodeVisitor):
    """The modules of the three rooms that a module imports, those inside functions included."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        # What only a type checker reads binds nothing. And a program runs as __main__, which nothing imports: it calls
        # the command line that its own file knows nothing of, because Prefect reads its settings when it is imported.
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "__name__ == '__main__'"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        self.found |= {name if name in MODULES else str(node.module) for name in names}


def imports_of(module: str) -> set[str]:
    visitor = _Imports()
    visitor.visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return {name for name in visitor.found if name.split(".")[0] in ROOMS}


IMPORTS = {module: imports_of(module) for module in MODULES}


def test_every_module_has_a_floor() -> None:
    idle = {module for module, path in MODULES.items() if path.stem == "__init__" and not IMPORTS[module]}
    assert set(floors()) == MODULES.keys() - idle


def test_imports_go_down() -> None:
    floor = floors()
    pairs = ((module, name) for module, names in IMPORTS.items() for name in names if name in floor)
    assert [f"{module} imports {name}" for module, name in pairs if floor[name] >= floor[module]] == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert [" → ".join(circle) for circle in circles()] == []


def circles() -> Iterator[list[str]]:
    """The circles among the imports, each once; whatever the written floors say."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> Iterator[list[str]]:
        if module in way:
            yield [*way[way.index(module) :], module]
        elif module not in done:
            for name in sorted(IMPORTS.get(module, ())):
                yield from walk(name, [*way, module])
            done.add(module)

    for module in MODULES:
        yield from walk(module, [])


def shown_in(folder: Path) -> tuple[list[str], list[Path]]:
    """The files and the folders that someone who opens a folder has to choose from."""
    shown = [path for path in sorted(folder.iterdir()) if path.name not in ("__init__.py", "__pycache__", "py.typed")]
    return [path.name for path in shown if path.is_file()], [path for path in shown if path.is_dir()]


@pytest.mark.parametrize("room", ROOMS)
def test_a_folder_can_be_taken_in_at_a_glance(room: str) -> None:
    files, folders = shown_in(ROOT / room)
    assert len(files) <= MOST_FILES, files
    assert len(folders) <= MOST_FOLDERS, folders
    for folder in folders:
        files, inner = shown_in(folder)
        assert len(files) <= MOST_FILES_INSIDE, files
        folders += inner


def test_no_module_of_flows_hides_a_room() -> None:
    """Prefect loads the script of a deployment with its folder first on the path."""
    files, folders = shown_in(ROOT / "flows")
    hidden = {Path(item).stem for item in (*files, *folders)} & {*ROOMS, "tests"}
    assert hidden == set()


# What is loaded when something is imported.


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a statement loads in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def all_of(room: str) -> str:
    return "import " + ", ".join(module for module in MODULES if module.split(".")[0] == room)


def test_kl_loads_nothing_but_numbers() -> None:
    foreign = {"flows", "backends", "prefect", "pluggy", "pydantic", "httpx", "httpx2", "requests", "google"}
    assert not loaded_by(all_of("kl")) & foreign


def test_backends_load_no_flow() -> None:
    assert not loaded_by(all_of("backends")) & {"flows", "prefect"}


def test_backends_load_the_model_libraries_only_with_a_model() -> None:
    assert not loaded_by("import backends.local.backend") & {"gguf", "tokenizers", "jinja2"}


def test_the_registry_loads_no_sdk() -> None:
    loaded = loaded_by("from backends.registry import build_targets; build_targets()")
    assert not loaded & {"google", "gguf", "prefect"}


def test_a_help_loads_no_arrays_and_no_flow() -> None:
    loaded = loaded_by("import flows.doors.tokenkl, flows.doors.init, flows.commands.run, flows.commands.sample")
    assert not loaded & {"numpy", "polars", "scipy", "prefect", "google", "rich"}
