"""kinoray: video classification at library scale on Ray. Start at cli.py, or at jobs/ for what a cluster runs.

The names below are what a Python program calls; api.py has them, and is imported when the first one is asked for.
What is easy to break: `kinoray.label` and `kinoray.train` are folders of this package as well. They stay modules,
whatever is imported first, and become callable.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Labelled", "Model", "Prediction", "Trained", "__version__", "label", "load", "read", "train"]

if TYPE_CHECKING:
    from kinoray.api import Labelled, Model, Prediction, Trained, label, load, read, train
else:

    class _CallableFolder(ModuleType):
        """A folder that calls the function of its name in api.py."""

        def __call__(self, *args: Any, **settings: Any) -> Any:
            from kinoray import api

            return getattr(api, self.__name__.rpartition(".")[2])(*args, **settings)

    for _folder in ("kinoray.label", "kinoray.train"):
        importlib.import_module(_folder).__class__ = _CallableFolder

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'kinoray' has no attribute {name!r}")
        from kinoray import api

        return getattr(api, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
