# SPDX-License-Identifier: Apache-2.0
"""Splits of a data set (train, val, test), recognised by the names of folders and files, and never mixed unasked.

Folders that stand beside each other are splits if at least two of them are called so: `train` and `val`, `train2017`
and `val2017`, `birds_train` and `birds_test`. A single folder `train` among others is a class, as in PASCAL VOC.
"""
import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from dnnlib import UserError
from dnnlib.util import list_some
from training.data.wrapping import wrapping_folder

SPLIT_WORDS = {
    "train": ("train", "training", "trn", "trainset"),
    "val": ("val", "valid", "validation", "dev", "devel", "development", "eval", "evaluation", "valset"),
    "test": ("test", "testing", "tst", "holdout", "testset"),
}
SPLITS = tuple(SPLIT_WORDS)
ALL = "all"
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}


def split_of_word(name: str) -> str | None:
    """'Training' -> 'train'; None for what is no usual name of a split."""
    return _SPLIT_OF.get(name.lower())


def _split_and_rest(name: str) -> tuple[str | None, str]:
    """'birds_train2017' -> ('train', 'birds'): the split that a name speaks of, and the other letters in it."""
    words = re.findall(r"[a-z]+", name.lower())
    found = [word for word in words if word in _SPLIT_OF]
    if len(found) != 1:
        return None, ""
    words.remove(found[0])
    rest = " ".join(word for word in words if word != "x")      # As in train_32x32.
    return _SPLIT_OF[found[0]], rest


def split_of_file(path: str) -> str | None:
    """The split that a file belongs to by its folders, else by its own name: 'data/train-00000-of-00002.parquet'."""
    *folders, name = path.replace("\\", "/").split("/")
    for folder in reversed(folders):
        if (split := split_of_word(folder)) is not None:
            return split
    if name.lower().startswith("t10k"):     # MNIST's name for its test images.
        return "test"
    return _split_and_rest(name.partition(".")[0])[0]

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Splits:
    """The splits that folders make of images."""

    keys: list[str]             # For each image its split; "" if it lies in none.
    inner: list[str]            # For each image its name without the folder of the split and what is around it.

    @property
    def counts(self) -> dict[str, int]:
        """Images in each split, in the usual order."""
        found = collections.Counter(key for key in self.keys if key)
        return {key: found[key] for key in in_order(found)}

    @property
    def loose(self) -> list[int]:
        """Numbers of the images that lie beside the splits."""
        return [i for i, key in enumerate(self.keys) if not key]


def in_order(keys: Iterable[str]) -> list[str]:
    """Names of splits: train, val, test, then others."""
    places = {split: i for i, split in enumerate(SPLITS)}
    return sorted(keys, key=lambda key: (places.get(_split_and_rest(key)[0] or "", len(places)), key))


def _keys_of_folders(folders: Iterable[str]) -> dict[str, str]:
    """Folder -> split for siblings, without those that are none; {} unless at least two splits are among them."""
    found: dict[str, dict[str, str]] = {}
    for folder in folders:
        split, rest = _split_and_rest(folder)
        if split is not None:
            found.setdefault(rest, {})[folder] = split
    best = max(found.values(), key=lambda group: len(set(group.values())), default={})
    splits = collections.Counter(best.values())
    if len(splits) < 2:
        return {}
    # Two folders of one split, such as train2014 and train2017, go by their own names.
    return {folder: split if splits[split] == 1 else folder.lower() for folder, split in best.items()}


def find_splits(names: Sequence[str]) -> Splits | None:
    """The splits that the folders of images make, or None.

    Splits are folders beside each other, in whatever folder lies around all of them, or folders inside of every class
    (cat/train, cat/test). A folder around everything that is called like a split is one, too.
    """
    names = list(names)
    wrap = wrapping_folder([min(names), max(names)] if names else [])
    inside = [name[len(wrap):] for name in names]
    tops = dict.fromkeys(name.partition("/")[0] for name in inside if "/" in name)
    keys = _keys_of_folders(tops)
    if keys:
        parts = [name.partition("/") for name in inside]
        return Splits([keys.get(top, "") if slash else "" for top, slash, _ in parts],
                      [rest if slash and top in keys else top + slash + rest for top, slash, rest in parts])
    found = _splits_in_classes(inside)
    if found is not None:
        return found
    around = [part for part in wrap.split("/") if split_of_word(part) is not None]
    if around:
        split = split_of_word(around[-1])
        assert split is not None
        return Splits([split] * len(inside), inside)
    return None


def _splits_in_classes(inside: Sequence[str]) -> Splits | None:
    """The same where every class has folders of splits."""
    seconds = set()
    for name in inside:
        parts = name.split("/", 2)
        if len(parts) < 3 or split_of_word(parts[1]) is None:
            return None
        seconds.add(split_of_word(parts[1]))
    if len(seconds) < 2:
        return None
    rows = [name.split("/", 2) for name in inside]
    return Splits([split_of_word(second) or "" for _, second, _ in rows], [f"{top}/{rest}" for top, _, rest in rows])

#----------------------------------------------------------------------------

def in_words(counts: Mapping[str, int], unit: str) -> str:
    """'train (100 images), val (30 images)'."""
    return list_some([f"{key} ({count} {unit if count != 1 else unit.removesuffix('s')})"
                      for key, count in counts.items()], 8)


def choose(where: str, counts: Mapping[str, int], wanted: str | None, option: str = "--split", unit: str = "images",
           loose: Sequence[str] = ()) -> list[str]:
    """The keys of the splits to take.

    Args:
        where: What has the splits, for messages.
        counts: Split -> how many `unit` it has.
        wanted: A split or 'all'; None: there must be one only.
        option: By which it is chosen.
        loose: What lies beside the splits.

    Raises:
        UserError: several are there and none is chosen, or not the chosen one.
    """
    told = in_words(counts, unit)
    beside = f", and beside them {list_some(loose, 3)}" if loose else ""
    if wanted is None:
        if len(counts) > 1 or (counts and loose):
            raise UserError(f"{where}: has the splits {told}{beside}: choose one with {option}={next(iter(counts))}, "
                            f"or take all with {option}={ALL}")
        return list(counts)
    if not counts:
        if wanted.lower() == ALL:
            return []
        raise UserError(f"{option}={wanted}: {where} has no splits: leave the option out, or name the folder or file "
                        f"of the split")
    if wanted.lower() == ALL:
        if loose:
            raise UserError(f"{option}={wanted}: {where} has the splits {told}{beside}, which belong to none of them: "
                            f"choose one split, or move what is beside them")
        return list(counts)
    exact = [key for key in counts if key.lower() == wanted.lower()]
    found = exact or [key for key in counts if _split_and_rest(key)[0] == split_of_word(wanted) is not None]
    if len(found) != 1:
        raise UserError(f"{option}={wanted}: {where} has the splits {told}: choose one of them, or {option}={ALL}")
    return found
