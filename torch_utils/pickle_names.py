# SPDX-License-Identifier: Apache-2.0
"""The closed list of what a pickle may name: see `torch_utils.safe_pickle`.

Being on the list gives no power: listed names are written down and not run either. The list tells network files, as
they are published, from files that were made for something else.
"""
import re

_PLAIN = """object type set frozenset dict list tuple int float complex bool str bytes bytearray slice range property
    staticmethod classmethod super getattr setattr delattr hasattr callable hash ord chr pow divmod isinstance
    issubclass len print zip map filter enumerate reversed sorted sum min max abs round all any iter next repr
    NotImplemented Ellipsis BaseException Exception ValueError TypeError KeyError IndexError AttributeError
    RuntimeError NotImplementedError AssertionError
    __main__ __dict__""".split()
_DILL = """_create_function _create_code _create_cell _create_type _create_namedtuple _create_array _create_ftype
    _create_dtypemeta _create_weakref _create_weakproxy _load_type _import_module _setattr _delattr _setitems
    _get_attr _getattribute _create_typing_tuple""".split()
_NUMPY = """dtype ndarray bool bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 intp
    complex64 complex128 str_ bytes_ generic number integer floating""".split()

# Module -> the names it may lend; None means any name of the module.
ALLOWED: dict[str, frozenset[str] | None] = {
    "builtins": frozenset(_PLAIN),
    "dill": frozenset({"_dill"}),
    "dill._dill": frozenset(_DILL),
    "dill.dill": frozenset(_DILL),
    "numpy": frozenset(_NUMPY),
    "numpy.dtypes": None,
    "numpy.core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy._core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy.core.numeric": frozenset({"_frombuffer"}),
    "numpy._core.numeric": frozenset({"_frombuffer"}),
    "numpy.random._pickle": None,
    "_codecs": frozenset({"encode"}),
    "copyreg": frozenset({"_reconstructor"}),
    "types": None, "functools": None, "collections": None, "collections.abc": None, "typing": None, "abc": None,
    "enum": None, "math": None,
    "pathlib": frozenset({"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"}),
    "torch": None, "torch._utils": None, "torch.storage": None, "torch._tensor": None, "torch.functional": None,
    "torch._C": None, "torch._C._nn": None, "torch.utils.hooks": None, "torch.cuda": None,
    "__main__": None,
}
# Packages whose modules may lend any name. `_imported_module_*` are modules that persistence made from source texts.
PACKAGES = ("torch.nn", "torch.ao.nn", "timm", "torchvision", "pg_modules", "feature_networks", "training", "metrics",
            "torch_utils", "dnnlib")
_IMPORTED = re.compile(r"_imported_module_[0-9a-f]+")
# Python 3 writes these under their Python 2 names in old protocols.
PYTHON2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def is_allowed(module: str, name: str) -> bool:
    """Whether a file may name `module.name`."""
    if module in ALLOWED:
        names = ALLOWED[module]
        return names is None or name in names
    return (any(module == package or module.startswith(package + ".") for package in PACKAGES)
            or _IMPORTED.fullmatch(module) is not None)


def is_storage_class(module: str, name: str) -> bool:
    """Whether this is one of torch's storage classes."""
    return module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage")
