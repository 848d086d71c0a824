"""Every public name is there, documented, and torch waits until it is needed."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import memgen_lens as mg


@pytest.mark.parametrize("name", mg.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name):
    value = getattr(mg, name)
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
        assert value.__doc__


def test_no_submodule_hides_a_public_name():
    """Importing `memgen_lens.x` sets the package's attribute ``x``, whatever the public name was."""
    modules = {path.stem for path in Path(mg.__file__).parent.iterdir() if path.stem != "__init__"}
    assert modules & set(mg.__all__) == {"tasks", "presets"}, "tasks is its own module; of presets see below"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'obsrve'"):
        _ = mg.obsrve


def test_importing_the_package_imports_no_torch():
    code = "import sys, memgen_lens; print(sorted({'torch', 'sklearn', 'scipy', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_presets_are_the_mapping_also_after_the_submodule_was_imported():
    import memgen_lens.presets

    assert mg.presets["quickstart"].preset == "quickstart"
    assert isinstance(memgen_lens.presets, dict)


def test_names_are_listed_for_completion():
    assert set(mg.__all__) <= set(dir(mg))
