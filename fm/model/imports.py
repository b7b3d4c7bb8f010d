"""Classes that a recipe imports by name, `{import: mypkg.net:MyNet, args: {...}}`, and which of them may be imported.

An import runs code, so a name is imported only if the user gave it on this machine: in a recipe that the user trains
(fm.datasets.load_own_recipe), with `--allow-import NAME`, in the environment variable WAVELIT_IMPORT, or in
`fm.load(..., allow_import=NAME)`. A name that stands in a run, an exported model or a repository of the Hugging Face
Hub is no permission. Code is found in the installed packages and then in the current folder. It is never found in the
folder of the model itself, even if the user allows the name.

Training remembers what it imported, in a file of the user's (`remembered_file`): the name, the arguments, and the files
that hold the code. All three must agree for a later command to import without being asked. So a model that someone else
made can lead to nothing but a call that the user's own training has made, of the same code with the same arguments.
"""

import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import field
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from data_pipeline.errors import UserError, brief, shortened
from data_pipeline.files import atomic_path, read_json

VARIABLE = "WAVELIT_IMPORT"  # names that may be imported, separated by commas; processes that this one starts have it
# The two forms of a section that either holds settings or imports a class, as pydantic's errors name them.
SETTINGS, IMPORT = FORMS = ("<settings>", "<import>")
MAX_NAME = 200  # characters
MOST_REMEMBERED = 200  # imports, the newest
T = TypeVar("T")
Settings = TypeVar("Settings")
Imported = TypeVar("Imported")


def _class_name(name: str) -> str:
    module, _, cls = name.partition(":")
    if len(name) > MAX_NAME or not all(part.isidentifier() for part in (*module.split("."), cls)):
        raise ValueError(f"expected the name of a class, such as mypkg.net:MyNet, got {brief(name)}")
    return name


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ImportSettings:
    """A class by its name, and the keyword arguments of its constructor."""

    import_: Annotated[str, Field(alias="import"), AfterValidator(_class_name)]
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The module that holds the class."""
        return self.import_.partition(":")[0]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ImportedOptimizer(ImportSettings):
    """A class of torch.optim.Optimizer; its `lr`, by default train.learning_rate, follows the schedule."""

    # matrices: it updates those that train.optimizer=muon gives to Muon, and AdamW updates all else
    parameters: Literal["all", "matrices"] = "all"


def form_of(section: Any) -> str:
    """Return which of FORMS a section of a recipe has, as plain values or as an object."""
    named = isinstance(section, Mapping) and "import" in section
    return IMPORT if named or isinstance(section, ImportSettings) else SETTINGS


# The type of a section in either of two forms: settings, or an import.
EitherForm: TypeAlias = Annotated[
    Annotated[Settings, Tag(SETTINGS)] | Annotated[Imported, Tag(IMPORT)], Discriminator(form_of)
]


def allow_imports(names: Iterable[str]) -> None:
    """Allow names to be imported by this process and by the processes that it starts. UserError for no such name."""
    try:
        added = set(map(_class_name, names))
    except ValueError as error:
        raise UserError(f"imports that are allowed: {error}") from error
    if added:
        os.environ[VARIABLE] = ",".join(sorted({*allowed_imports(), *added}))


def allowed_imports() -> set[str]:
    """Return the names that may be imported."""
    return {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {""}


def remembered_file() -> Path:
    """Return the file of what training imported: $XDG_STATE_HOME/wavelit/imports.json, by default ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wavelit" / "imports.json"


def remember_imports(imported: Iterable[ImportSettings]) -> None:
    """Let later commands import what is allowed now, with the same arguments and from the same files.

    Only the first process of a launch writes the file, which only the user can read. A note is printed if it cannot be
    written. To revoke an entry, delete it from the file.
    """
    allowed, known = allowed_imports(), _remembered()
    chosen = [one for one in imported if one.import_ in allowed and _module_files(one.module)]
    added = [entry for entry in map(_remembered_as, chosen) if entry not in known]
    if not added or os.environ.get("RANK", "0") != "0":
        return
    try:
        file = remembered_file()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_path(file) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps({"imports": [*known, *added][-MOST_REMEMBERED:]}, indent=1) + "\n")
    except (OSError, RuntimeError, ValueError) as error:  # no home, say
        names = ", ".join(one.import_ for one in chosen)
        print(f"{names}: not remembered, so later commands need --allow-import ({error})", file=sys.stderr)


def _remembered() -> list[str]:
    """Return the entries: none if another user could have written the file, or it is damaged."""
    try:
        file = remembered_file()
        found = file.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            return []
        imports = read_json(file).get("imports")
    except (OSError, RuntimeError, UserError):
        return []
    return [one for one in imports if isinstance(one, str)] if isinstance(imports, list) else []


def _remembered_as(settings: ImportSettings) -> str:
    """Return the entry of an import, JSON with its name, its arguments, and the files that its code is in."""
    files = list(map(str, _module_files(settings.module)))
    return json.dumps({"import": settings.import_, "args": dict(settings.args), "files": files}, sort_keys=True)


def check_allowed(settings: ImportSettings, where: str, folder: Path | None = None) -> None:
    """Raise UserError unless the user allowed the import, and its code lies outside `folder`. No code runs.

    `where` is the file or the setting that gives the name, and `folder` holds the file.
    """
    name = settings.import_
    files = _module_files(settings.module)
    code = ", ".join(map(str, files)) or "which is not found here: install it, or change to the folder that holds it"
    if name not in allowed_imports() and not (files and _remembered_as(settings) in _remembered()):
        raise UserError(
            f"{where}: {name} is no code of this project, and the files of a model or a run may not choose which code "
            f"runs here. If you trust this code ({code}), add --allow-import {name} to the command, set {VARIABLE}="
            f"{name} in the environment, or in Python use fm.load(..., allow_import={name!r})"
        )
    inner = [file for file in files if folder is not None and _is_inside(file, folder)]
    if inner:
        raise UserError(
            f"{where}: {name} would be imported from {inner[0]}, inside the model's own folder, where whoever made the "
            "model chose the code. Read the code, and copy it to a folder of your own if you trust it"
        )


def _is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder, by its path or by where links lead."""
    return any(one.is_relative_to(folder.resolve()) for one in (file.resolve(), file.parent.resolve() / file.name))


def _module_files(module: str) -> list[Path]:
    """Return the files that `import module` would run, as far as they are found without running any code."""
    files, path, parts = list[Path](), None, module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        spec = (
            getattr(sys.modules[name], "__spec__", None) if name in sys.modules else _find_spec(parts[count - 1], path)
        )
        if spec is None:
            break
        if spec.has_location and spec.origin is not None:
            files.append(Path(spec.origin).absolute())
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return files


def _find_spec(name: str, path: list[str] | None) -> ModuleSpec | None:
    """Find a package or module of the folders `path`; None: of those that Python searches, then the current one."""
    if path is not None:
        return PathFinder.find_spec(name, path)
    return _find_installed(name) or PathFinder.find_spec(name, [os.getcwd()])


def _find_installed(name: str) -> ModuleSpec | None:
    return next(filter(None, (finder.find_spec(name, None) for finder in sys.meta_path)), None)


def import_class(settings: ImportSettings, base: type[T], key: str) -> type[T]:
    """Return the class that the setting `key` names.

    UserError if the name is not allowed, the module or the class is not found, or it is no subclass of `base`.
    """
    name = settings.import_
    check_allowed(settings, key)
    module_name, _, attribute = name.partition(":")
    package = module_name.partition(".")[0]
    if package not in sys.modules and _find_installed(package) is None:
        sys.path.append(os.getcwd())  # the last place, so that a file of the folder hides no installed package
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        own = f"{module_name}.".startswith(f"{missing}.")
        cause = "it is not installed, and not in the current folder" if own else f"it needs {missing}, which is missing"
        raise UserError(
            f"{key}: {name} cannot be imported: {cause}. Install the package ({missing}) in this environment, or run "
            f"the command in the folder that holds it (now: {os.getcwd()})"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{key}: {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{key}: {name} cannot be imported: {module_name} has no class {attribute}")
    found = getattr(module, attribute)
    if not (isinstance(found, type) and issubclass(found, base)):
        expected = f"{base.__module__.removesuffix('.module').removesuffix('.modules')}.{base.__name__}"
        raise UserError(f"{key}: expected a subclass of {expected}, got {name}, which is {brief(found)}")
    return found


def construct(cls: type[T], settings: ImportSettings, key: str, *given: Any, **named: Any) -> T:
    """Return `cls(*given, **named, **args)`. UserError, with the signature of the class, if it refuses them."""
    name, arguments = settings.import_, {**named, **settings.args}
    try:
        signature = inspect.signature(cls)
    except ValueError:  # of a class that is written in C
        signature = None
    text = f"{name}{'(...)' if signature is None else shortened(str(signature), 500)}"
    passed = ", ".join([*(f"{key}={value!r}" for key, value in named.items()), f"args {brief(dict(settings.args))}"])
    try:
        if signature is not None:
            signature.bind(*given, **arguments)
    except TypeError as error:
        raise UserError(f"{key}.args: expected arguments of {text}, got {passed}: {error}") from error
    try:
        return cls(*given, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise UserError(f"{key}.args: expected arguments that {text} accepts, got {passed}: {reason}") from error
