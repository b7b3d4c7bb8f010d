"""What users import is documented: by pydoc, in their terminal."""

import inspect
import pydoc

import fm
from fm.model.fields import FieldsWarning
from fm.model.surrogate import Surrogate


def test_pydoc_shows_every_public_method_with_its_docstring() -> None:
    page = pydoc.plain(pydoc.render_doc(fm.WaveLiTFM))
    own = [cls for cls in fm.WaveLiTFM.__mro__ if cls.__module__.startswith("fm.")]
    assert own == [fm.WaveLiTFM, Surrogate]
    names = {name for cls in own for name in vars(cls) if not name.startswith("_") and callable(getattr(cls, name))}
    assert names >= {"predict", "rollout", "from_pretrained", "save_pretrained", "push_to_hub"}
    for name in names:
        text = inspect.getdoc(getattr(fm.WaveLiTFM, name))
        assert text, name
        assert text.splitlines()[0] in page, name


def test_the_package_hands_on_what_it_names() -> None:
    assert "WaveLiTFM" in pydoc.plain(pydoc.render_doc(fm))
    assert fm.__all__ == [name for name in fm.__all__ if getattr(fm, name)]
    assert "probably not" in (FieldsWarning.__doc__ or "")
