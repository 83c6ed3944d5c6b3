"""Which generated clip and which reference clip belong together: those of one id, or else of one file name."""

from __future__ import annotations

from collections import Counter

from .clip_lists import ClipList

_EXAMPLES = 3


def find_pairs(generated: ClipList, reference: ClipList) -> list[tuple[int, int]]:
    """Places in both lists of the clips that are pairs, in the order of the generated list.

    A generated clip goes with the reference clip of its id (of its prompt's id, if it is one of several of a prompt),
    or else with the one whose file has that name without suffix, or its own file's name, if only one has. Several
    clips of a prompt have one partner; otherwise nothing is used twice.
    """
    ids = {entry.id: place for place, entry in enumerate(reference.entries)}
    names = Counter(entry.path.stem for entry in reference.entries)
    stems = {entry.path.stem: place for place, entry in enumerate(reference.entries) if names[entry.path.stem] == 1}
    pairs, owners = [], dict[int, str]()
    for place, entry in enumerate(generated.entries):
        candidates = (ids.get(entry.id), ids.get(entry.pair), stems.get(entry.pair), stems.get(entry.path.stem))
        found = next((other for other in candidates if other is not None), None)
        if found is not None and owners.setdefault(found, entry.pair) == entry.pair:
            pairs.append((place, found))
    return pairs


def no_pairs(generated: ClipList, reference: ClipList) -> str:
    """Why there is no pair, with ids of both lists."""
    some = [", ".join(repr(e.id) for e in clips.entries[:_EXAMPLES]) for clips in (generated, reference)]
    return f"no id is in both lists: {generated.path} has {some[0]}, {reference.path} has {some[1]}"
