"""Training images in folders, read by torchvision: what is in them, which are refused, and broken files."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.transforms.v2 import functional

from senet_fused.arguments import RequestError
from senet_fused.train.data import broken_files, loader_state, make_loader, open_source, restore_loader, set_epoch
from senet_fused.train.items import in_epoch

CLASSES = ("cat", "dog", "eel")
MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def picture(seed):
    pixels = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return functional.to_pil_image(pixels).resize((70, 50))


@pytest.fixture
def folder(tmp_path):
    """Three classes of four training and two held-out images, 70 x 50 pixels; PNG, so that pixels are kept."""
    for part, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for place in range(count):
                picture(100 * number + place + count).save(tmp_path / part / name / f"{place}.png")
    return tmp_path


def opened(folder, **how):
    return open_source(f"imagefolder:{folder}", **{"size": 32, "seed": 1, **how})


def batches(loader):
    return [(images.clone(), targets.tolist()) for images, targets in loader]


def same(first, second):
    return len(first) == len(second) and all(
        a[1] == b[1] and torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True)
    )


def test_held_out_images_are_centre_crops(folder):
    source = opened(folder)
    assert source.classes == CLASSES and source.shape == (3, 32, 32)
    assert (len(source.train), len(source.held_out)) == (12, 6)
    side = round(32 * 256 / 224)
    for index in range(6):
        with Image.open(folder / "val" / CLASSES[index // 2] / f"{index % 2}.png") as image:
            whole = functional.resize(image.convert("RGB"), [side, side * 70 // 50])
        pixels = functional.pil_to_tensor(functional.center_crop(whole, [32, 32])).float() / 255
        image, target = source.held_out[index]
        torch.testing.assert_close(image, (pixels - MEAN) / STD)
        assert target == index // 2 and image.dtype == torch.float32
    plain = opened(folder, augment=False).train
    assert plain[5][1] == 1 and plain[5][0].shape == (3, 32, 32)
    assert torch.equal(plain[5][0], opened(folder, augment=False, seed=2).train[5][0])
    assert opened(folder, size=None).shape == (3, 224, 224)
    assert torch.equal(pickle.loads(pickle.dumps(source.train))[3][0], source.train[3][0]), "for spawned processes"


def test_augmentation_depends_on_seed_epoch_and_index(folder):
    train = opened(folder).train
    torch.manual_seed(3)
    before = torch.get_rng_state()
    images = []
    for epoch in range(12):
        with in_epoch(epoch):
            images.append(train[2][0].clone())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    torch.manual_seed(77)
    with in_epoch(7):
        assert torch.equal(opened(folder).train[2][0], images[7])
        assert not torch.equal(opened(folder, seed=2).train[2][0], images[7])
    assert images[0].shape == (3, 32, 32) and (images[0] * STD + MEAN).min() >= -1e-6


def test_training_images_are_crops_and_half_are_mirrored(folder):
    """In a picture that gets brighter to the right, crops do too, unless they are mirrored."""
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(3, 64, 64)
    for file in (folder / "train").rglob("*.png"):
        functional.to_pil_image(ramp).save(file)
    train = opened(folder).train
    slopes, widths = [], []
    for epoch in range(10):
        with in_epoch(epoch):
            for index in range(len(train)):
                row = (train[index][0] * STD + MEAN).mean((0, 1))
                slopes.append(float(row[-1] - row[0]))
                widths.append(abs(slopes[-1]))
    assert 40 < sum(slope < 0 for slope in slopes) < 80
    assert min(widths) < 0.5 and max(widths) > 0.9, "crops of many sizes"


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_with_worker_processes(folder, workers):
    def loader(workers):
        return make_loader(opened(folder).train, batch_size=4, seed=0, shuffle=True, workers=workers)

    whole = loader(0)
    set_epoch(whole, 2)
    whole = batches(whole)
    first = loader(workers)
    set_epoch(first, 2)
    iterator = iter(first)
    images, targets = next(iterator)
    assert same([(images, targets.tolist())], whole[:1])
    second = loader(2 - workers)
    restore_loader(second, loader_state(first), epoch=2)
    assert same(batches(second), whole[1:])


# ---- folders that are refused


def refused(folder, *named, **how):
    with pytest.raises(RequestError) as error:
        opened(folder, **how)
    for words in named:
        assert words in str(error.value)


def test_folders_that_are_refused(folder):
    refused(folder / "none", f"no folder {folder}/none/train", "a folder per class")
    (folder / "bare" / "train").mkdir(parents=True)
    refused(folder / "bare", f"{folder}/bare/train has no folders")
    for name in ("ant", "bee"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "list.txt").write_text("no image")
    refused(folder, f"{folder}/train has classes without images: ant, bee", ".jpg")
    for name in ("ant", "bee"):
        picture(0).save(folder / "train" / name / "0.png")
    (folder / "val" / "eel").rename(folder / "val" / "fox")
    refused(folder, "differ", "only in train: ant, bee, eel; only in val: fox")


# ---- broken files


def cut(path):
    path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(folder, workers):
    path = cut(folder / "train" / "dog" / "1.png")
    loader = make_loader(opened(folder).train, batch_size=12, seed=0, shuffle=True, workers=workers)
    with pytest.raises(RequestError) as error:
        next(iter(loader))
    message = str(error.value)
    # The frames hold the loader in a circle, and one that the garbage collector finds waits for its workers in vain.
    traceback.clear_frames(error.tb)
    del error
    assert message.startswith(f"cannot read the image {path}: ") and message.endswith("ask to skip broken images")
    assert "Traceback" not in message


def test_a_broken_image_is_replaced_by_the_next(folder):
    whole = opened(folder, augment=False)
    whole = [whole.train[index] for index in range(12)]
    broken = [cut(folder / "train" / "dog" / "1.png"), folder / "train" / "dog" / "2.png"]
    broken[1].write_text("no image at all")
    last = cut(folder / "train" / "eel" / "3.png")
    source = opened(folder, augment=False, broken="skip")
    assert broken_files(source.train) == []
    with pytest.warns(UserWarning) as warned:
        items = [source.train[index] for _ in range(2) for index in range(12)][:12]
    assert sorted(str(one.message).split(": ")[0] for one in warned) == sorted(
        f"skipping the broken image {path}" for path in (*broken, last)
    ), "each once"
    assert broken_files(Subset(source.train, [0])) == [str(path) for path in (*broken, last)]
    assert broken_files(source.held_out) == []
    # Items 5 and 6 are item 7 now, and the last one is the first, with their classes.
    for index, (image, target) in enumerate(items):
        expected = whole[{5: 7, 6: 7, 11: 0}.get(index, index)]
        assert torch.equal(image, expected[0]) and target == expected[1]


def test_skipping_in_worker_processes(folder, capfd, monkeypatch):
    """The same batches as without; one warning a file even over epochs; and the main process knows of it."""
    # pytest would keep a worker's warnings in that worker.
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest, **more: os.write(2, f"{message}\n".encode()))
    path = cut(folder / "train" / "dog" / "1.png")
    seen = []
    for workers in (0, 2):
        loader = make_loader(opened(folder, broken="skip").train, batch_size=5, seed=0, shuffle=True, workers=workers)
        seen.append([])
        for epoch in range(3):
            set_epoch(loader, epoch)
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                seen[-1] += batches(loader)
        assert broken_files(loader.dataset) == [str(path)]
        assert capfd.readouterr().err.count(f"skipping the broken image {path}") == 1
    assert same(*seen) and [len(targets) for _, targets in seen[0]] == [5, 5, 2] * 3


def test_what_is_not_skipped(folder):
    source = opened(folder, broken="skip")
    gone = folder / "train" / "dog" / "1.png"
    gone.unlink()
    with pytest.raises(RequestError, match=rf"cannot read the image {gone}: .*No such file"):
        source.train[5]
    for path in (folder / "val").rglob("*.png"):
        cut(path)
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(RequestError, match="none of the 6 images"):
        source.held_out[3]
