"""Keep from the user what other libraries say about themselves and a user of ours can do nothing about."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence TransformerLens' warnings about its own future, and tqdm's about a missing notebook widget."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*HookedTransformer.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="IProgress not found")
        warnings.filterwarnings("ignore", module=r"transformer_lens(\..*)?")
        yield
