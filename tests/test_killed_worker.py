"""A worker is killed at any step of any call; the next one carries on, and nothing happens twice or by half."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from killed_store import killed_at, new_store, on_disk
from stores import Found, content, put, tree

from imgfs.batch import NewImage
from imgfs.errors import BadHandle
from imgfs.requests import TASKS_MAX, Request
from imgfs.store import ROOT, Store

REQUEST = Request(9, 4711, ROOT, 0xABCDEF)
OTHER_ROW = TASKS_MAX  # of another worker
KIB = 1 << 10


@dataclass
class Scene:
    """What is called, and how its effect is seen."""

    call: Callable[[Store], object]
    once: bool = True
    """Whether it must not be done again once it was applied; all else may."""
    needles: int = 1
    """Changes that the next daemon may find one without the other."""


def make(store: Store) -> Scene:
    return Scene(lambda worker: worker.mkdir(ROOT, b"new", 0o755, 1, 1))


def make_link(store: Store) -> Scene:
    return Scene(lambda worker: worker.symlink(ROOT, b"new", b"target", 1, 1))


def make_pipe(store: Store) -> Scene:
    return Scene(lambda worker: worker.special(ROOT, b"new", 0o10644, 0, 1, 1))


def link(store: Store) -> Scene:
    inode = put(store, ROOT, b"a")
    return Scene(lambda worker: worker.link(inode, ROOT, b"b"))


def link_of_an_unborn(store: Store) -> Scene:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"bytes")
    return Scene(lambda worker: worker.link(inode, ROOT, b"b"), needles=2)


def create(store: Store) -> Scene:
    return Scene(lambda worker: worker.create_image(ROOT, b"new", 0o644, 7, 7))


def unlink(store: Store) -> Scene:
    put(store, ROOT, b"a")
    return Scene(lambda worker: worker.unlink(ROOT, b"a"))


def unlink_one_of_two_names(store: Store) -> Scene:
    store.link(put(store, ROOT, b"a"), ROOT, b"b")
    return Scene(lambda worker: worker.unlink(ROOT, b"a"))


def unlink_an_unborn(store: Store) -> Scene:
    store.create_image(ROOT, b"a", 0o644, 1, 1)
    return Scene(lambda worker: worker.unlink(ROOT, b"a"))


def unlink_while_it_is_written(store: Store) -> Scene:
    handle = store.open_image(put(store, ROOT, b"a"), write=True)
    store.write(handle, 0, b"other")
    return Scene(lambda worker: worker.unlink(ROOT, b"a"))


def remove_directory(store: Store) -> Scene:
    store.mkdir(ROOT, b"d", 0o755, 0, 0)
    return Scene(lambda worker: worker.rmdir(ROOT, b"d"))


def rename(store: Store) -> Scene:
    put(store, ROOT, b"a")
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    return Scene(lambda worker: worker.rename(ROOT, b"a", directory, b"b"))


def rename_over(store: Store) -> Scene:
    put(store, ROOT, b"a", b"new")
    put(store, ROOT, b"b", b"old")
    return Scene(lambda worker: worker.rename(ROOT, b"a", ROOT, b"b"))


def rename_an_unborn_over_one_that_is_written(store: Store) -> Scene:
    _, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"new")
    other = store.open_image(put(store, ROOT, b"b", b"old"), write=True)
    store.write(other, 0, b"half")
    return Scene(lambda worker: worker.rename(ROOT, b"a", ROOT, b"b"), needles=2)


def exchange(store: Store) -> Scene:
    put(store, ROOT, b"a", b"one")
    put(store, store.mkdir(ROOT, b"d", 0o755, 0, 0), b"b", b"other")
    return Scene(lambda worker: worker.exchange(ROOT, b"a", ROOT, b"d"))


def set_attribute(store: Store) -> Scene:
    inode = put(store, ROOT, b"a")
    return Scene(lambda worker: worker.set_xattr(inode, b"user.a", b"value"))


def remove_attribute(store: Store) -> Scene:
    inode = put(store, ROOT, b"a")
    store.set_xattr(inode, b"user.a", b"value")
    return Scene(lambda worker: worker.remove_xattr(inode, b"user.a"))


def remove_attribute_of_an_unborn(store: Store) -> Scene:
    inode, _ = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.set_xattr(inode, b"user.a", b"value")
    return Scene(lambda worker: worker.remove_xattr(inode, b"user.a"))


def set_mode(store: Store) -> Scene:
    inode = put(store, ROOT, b"a")
    return Scene(lambda worker: worker.set_attr(inode, mode=0o600, mtime_ns=77), once=False)


def write_to_a_new_image(store: Store) -> Scene:
    _, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"0123")
    return Scene(lambda worker: worker.write(handle, 2, b"abcdef"), once=False)


def write_past_the_end_of_an_image_before(store: Store) -> Scene:
    _, handle = store.create_image(ROOT, b"before", 0o644, 1, 1)
    store.write(handle, 0, b"before" * KIB)
    store.release(handle)
    _, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"start")
    return Scene(lambda worker: worker.write(handle, 5 * KIB, b"end"), once=False)


def first_write(store: Store) -> Scene:
    handle = store.open_image(put(store, ROOT, b"a", b"old bytes" * 100), write=True)
    return Scene(lambda worker: worker.write(handle, 5, b"new"), once=False)


def write_past_the_end(store: Store) -> Scene:
    handle = store.open_image(put(store, ROOT, b"a", b"old"), write=True)
    store.write(handle, 3, b"longer than after")
    store.truncate(store.handle_inode(handle), 4)
    return Scene(lambda worker: worker.write(handle, 10, b"new"), once=False)


def flush(store: Store) -> Scene:
    _, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"bytes")
    return Scene(lambda worker: worker.flush(handle), once=False)


def close(store: Store) -> Scene:
    _, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"bytes")
    return Scene(lambda worker: worker.flush(handle), once=False)


def close_one_of_two(store: Store) -> Scene:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.open_image(inode, write=True)
    store.write(handle, 0, b"bytes")
    return Scene(lambda worker: worker.flush(handle), once=False)


def flush_with_attributes(store: Store) -> Scene:
    inode, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"bytes")
    store.set_xattr(inode, b"user.a", b"value")
    return Scene(lambda worker: worker.flush(handle), once=False)


def flush_what_is_large(store: Store) -> Scene:
    _, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    store.write(handle, 0, b"bytes" * (500 * KIB))
    return Scene(lambda worker: worker.flush(handle), once=False)


def release(store: Store) -> Scene:
    handle = store.open_image(put(store, ROOT, b"a", b"old"), write=True)
    store.write(handle, 0, b"newer")
    return Scene(lambda worker: worker.release(handle), once=False)


def release_of_an_unborn(store: Store) -> Scene:
    _, handle = store.create_image(ROOT, b"a", 0o644, 1, 1)
    return Scene(lambda worker: worker.release(handle), once=False)


def release_of_an_unlinked(store: Store) -> Scene:
    handle = store.open_image(put(store, ROOT, b"a", b"old"), write=True)
    store.write(handle, 0, b"newer")
    store.unlink(ROOT, b"a")
    return Scene(lambda worker: worker.release(handle), once=False)


def cut(store: Store) -> Scene:
    inode = put(store, ROOT, b"a", b"0123456789")
    return Scene(lambda worker: worker.truncate(inode, 4), once=False)


def cut_to_nothing_at_open(store: Store) -> Scene:
    inode = put(store, ROOT, b"a", b"0123456789")

    def call(worker: Store) -> None:
        worker.release(worker.open_image(inode, write=True, truncate=True, row=worker.requester))

    return Scene(call, once=False)


def seal_and_go_on(store: Store) -> Scene:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    put(store, directory, b"large", bytes(50 * KIB))
    return Scene(lambda worker: put(worker, directory, b"next", bytes(20 * KIB)))


def put_many(store: Store) -> Scene:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    put(store, directory, b"there")
    images = [NewImage(directory, b"%d" % number, bytes(number), 1, 1, 0o600, number) for number in range(20)]

    def call(worker: Store) -> None:
        done = 0
        while done < len(images):
            done += worker.put_new(images[done:])

    return Scene(call, once=False, needles=20)


def sync_with_a_checkpoint(store: Store) -> Scene:
    directory = store.mkdir(ROOT, b"d", 0o755, 0, 0)
    for number in range(10):
        put(store, directory, b"%d" % number)
    return Scene(lambda worker: worker.sync(), once=False)


SCENES: dict[str, Callable[[Store], Scene]] = {
    scene.__name__: scene
    for scene in (
        make,
        make_link,
        make_pipe,
        link,
        link_of_an_unborn,
        create,
        unlink,
        unlink_one_of_two_names,
        unlink_an_unborn,
        unlink_while_it_is_written,
        remove_directory,
        rename,
        rename_over,
        rename_an_unborn_over_one_that_is_written,
        exchange,
        set_attribute,
        remove_attribute,
        remove_attribute_of_an_unborn,
        set_mode,
        write_to_a_new_image,
        first_write,
        write_past_the_end_of_an_image_before,
        write_past_the_end,
        flush,
        close,
        close_one_of_two,
        flush_with_attributes,
        flush_what_is_large,
        release,
        release_of_an_unborn,
        release_of_an_unlinked,
        cut,
        cut_to_nothing_at_open,
        seal_and_go_on,
        put_many,
        sync_with_a_checkpoint,
    )
}


class Seen(dict[bytes, tuple[Found, tuple[tuple[bytes, bytes], ...], int]]):
    """What a store holds: the tree, extended attributes, and links; times are those of the test where it sets them."""

    def __init__(self, store: Store) -> None:
        for path, found in tree(store).items():
            names = tuple((name, store.get_xattr(found.inode, name)) for name in store.list_xattrs(found.inode))
            known = found._replace(mtime_ns=found.mtime_ns if found.mtime_ns < 100 else 0)
            self[path] = known, names, store.attr(found.inode).nlink


@pytest.mark.parametrize("torn", [False, True], ids=["between steps", "within a step"])
@pytest.mark.parametrize("name", SCENES)
def test_killed_at_each_step(name: str, torn: bool) -> None:
    with new_store() as store:
        scene = SCENES[name](store)
        before, handles, durable_before = Seen(store), store._handles.count(), on_disk_seen(store)
        scene.call(store)
        after, handles_after, durable_after = Seen(store), store._handles.count(), on_disk_seen(store)
    # Between steps it makes a difference where; within one, every other is enough.
    for step in itertools.count(0, 2 if torn else 1):
        with new_store() as store:
            scene = SCENES[name](store)
            was_killed = killed_at(store, step, partial(work, scene), torn=torn)
            store.roll_forward()
            store.settle(0, [REQUEST])
            store.roll_forward()
            result = store.requests.resent(OTHER_ROW, REQUEST)
            if step % 4 < 2:
                found = on_disk_seen(store)
                assert scene.needles > 1 or found in (durable_before, durable_after), f"killed at step {step}"
            if scene.once:
                assert Seen(store) == (after if result else before), f"killed at step {step}"
                assert store._handles.count() == (handles_after if result else handles)
            if result is None:
                assert was_killed or not scene.once, "who did all of it and did not answer has applied it"
                again(scene, store)
            assert Seen(store) == after, f"killed at step {step}"
            assert store._handles.count() == handles_after
            assert all(is_needed(store, inode) for inode in store._staging.inodes())
            put(store, ROOT, b"one more", b"goes on")
            assert content(store, store.lookup(ROOT, b"one more")) == b"goes on"
            store.unlink(ROOT, b"one more")
            if step % 8 == 0:
                assert on_disk_seen(store) == durable_after
            if not was_killed:
                break
    assert step > 5


@pytest.mark.parametrize("name", ["create", "first_write", "cut_to_nothing_at_open", "release", "release_of_an_unborn"])
def test_who_comes_before_it_is_settled_gets_nothing_of_it(name: str) -> None:
    """Another worker makes and changes images before anybody puts right what the killed one left."""
    with new_store() as store:
        SCENES[name](store).call(store)
        after = Seen(store)
    for step in itertools.count():
        with new_store() as store:
            scene = SCENES[name](store)
            before = Seen(store)
            was_killed = killed_at(store, step, partial(work, scene), torn=False)
            inode, handle = store.create_image(ROOT, b"other", 0o644, 1, 1)
            store._staging.after_fork()  # what follows is done by a third worker
            store.write(handle, 0, b"its own bytes")
            again = store.open_image(put(store, ROOT, b"third", b"third"), write=True)
            store.write(again, 0, b"THIRD")
            assert (store.name(inode), store.attr(inode).size) == (b"other", 13)
            store.roll_forward()
            store.settle(0, [REQUEST])
            for each in (handle, again):
                store.flush(each)
                store.release(each)
            assert content(store, store.lookup(ROOT, b"other")) == b"its own bytes"
            assert content(store, store.lookup(ROOT, b"third")) == b"THIRD"
            store.unlink(ROOT, b"other")
            store.unlink(ROOT, b"third")
            assert without_inodes(Seen(store)) in (without_inodes(before), without_inodes(after)), (
                f"killed at step {step}"
            )
            if not was_killed:
                break
    assert step > 5


def without_inodes(seen: Seen) -> dict[bytes, object]:
    return {path: (found._replace(inode=0, mtime_ns=0), names, links) for path, (found, names, links) in seen.items()}


def work(scene: Scene, worker: Store) -> None:
    worker.requests.begin(0, REQUEST)
    worker.requester = 0
    scene.call(worker)


def again(scene: Scene, store: Store) -> None:
    """Do what the kernel sends again, as the edge does: a handle that is gone was released."""
    try:
        scene.call(store)
    except BadHandle:
        assert not scene.once


def is_needed(store: Store, inode: int) -> bool:
    attr = store.attr(inode)
    return bool(store._handles.writers(inode)) or not attr.nlink


def on_disk_seen(store: Store) -> Seen:
    with on_disk(store) as twin:
        assert not twin.report.damage
        return Seen(twin)
