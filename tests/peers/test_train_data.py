"""Training with torchvision: images in folders and CIFAR-10, what is refused, broken files, and its networks."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import traceback

import numpy
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional

from senet_fused.arguments import RequestError
from senet_fused.train import command, network
from senet_fused.train.data import make_loader, open_source

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


def batches(loader, epoch, skip=0):
    loader.sampler.start(epoch, skip)
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
        image, target = source.held_out[0, index]
        torch.testing.assert_close(image, (pixels - MEAN) / STD)
        assert target == index // 2 and image.dtype == torch.float32
    plain = opened(folder, augment=False).train
    assert plain[0, 5][1] == 1 and plain[0, 5][0].shape == (3, 32, 32)
    assert torch.equal(plain[0, 5][0], opened(folder, augment=False, seed=2).train[0, 5][0])
    assert opened(folder, size=None).shape == (3, 224, 224)
    assert torch.equal(pickle.loads(pickle.dumps(source.train))[0, 3][0], source.train[0, 3][0]), (
        "for spawned processes"
    )


def test_augmentation_depends_on_seed_epoch_and_index(folder):
    train = opened(folder).train
    torch.manual_seed(3)
    before = torch.get_rng_state()
    images = [train[epoch, 2][0].clone() for epoch in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    torch.manual_seed(77)
    assert torch.equal(opened(folder).train[7, 2][0], images[7])
    assert not torch.equal(opened(folder, seed=2).train[7, 2][0], images[7])
    assert images[0].shape == (3, 32, 32) and (images[0] * STD + MEAN).min() >= -1e-6


def test_training_images_are_crops_and_half_are_mirrored(folder):
    """In a picture that gets brighter to the right, crops do too, unless they are mirrored."""
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(3, 64, 64)
    for file in (folder / "train").rglob("*.png"):
        functional.to_pil_image(ramp).save(file)
    train = opened(folder).train
    slopes, widths = [], []
    for epoch in range(10):
        for index in range(len(train)):
            row = (train[epoch, index][0] * STD + MEAN).mean((0, 1))
            slopes.append(float(row[-1] - row[0]))
            widths.append(abs(slopes[-1]))
    assert 40 < sum(slope < 0 for slope in slopes) < 80
    assert min(widths) < 0.5 and max(widths) > 0.9, "crops of many sizes"


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_with_worker_processes(folder, workers):
    def loader(workers):
        return make_loader(opened(folder).train, 4, 0, workers=workers)

    assert same(batches(loader(2 - workers), 2, skip=4), batches(loader(workers), 2)[1:])


# ---- folders that are refused


def refused(folder, *named, **how):
    with pytest.raises(RequestError) as error:
        opened(folder, **how)
    for words in named:
        assert words in str(error.value)


def test_folders_that_are_refused(folder):
    refused(folder / "none", f"{folder}/none must have train/CLASS/* and val/CLASS/*", f"{folder}/none/train")
    (folder / "bare" / "train").mkdir(parents=True)
    refused(folder / "bare", f"any class folder in {folder}/bare/train")
    (folder / "train" / "ant").mkdir()
    (folder / "train" / "ant" / "list.txt").write_text("no image")
    refused(folder, f"{folder} must have train/CLASS/* and val/CLASS/*, with images", "ant", ".jpg")
    picture(0).save(folder / "train" / "ant" / "0.png")
    (folder / "val" / "eel").rename(folder / "val" / "fox")
    refused(folder, f"{folder}/train and {folder}/val must have the same classes; in only one: ant, eel, fox")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(folder, workers):
    path = folder / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    loader = make_loader(opened(folder).train, 12, 0, workers=workers)
    with pytest.raises(RequestError) as error:
        next(iter(loader))
    message = str(error.value)
    # The frames hold the loader in a circle, and one that the garbage collector finds waits for its workers in vain.
    traceback.clear_frames(error.tb)
    del error
    assert message.startswith(f"cannot read the image {path}: ") and message.endswith("; replace it or remove it")
    assert "Traceback" not in message


# ---- CIFAR-10


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """The files of CIFAR-10, four images each, with their checksums in torchvision's list."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = numpy.random.default_rng(0)

    def written(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        data = generator.integers(0, 256, (4, 3072), dtype=numpy.uint8)
        return [name, written(name, {"data": data, "labels": generator.integers(0, 10, 4).tolist()})]

    names = [f"kind {number}" for number in range(10)]
    meta = {"filename": "batches.meta", "key": "label_names", "md5": written("batches.meta", {"label_names": names})}
    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{number}") for number in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return folder


def test_cifar10(cifar10):
    source = open_source(f"cifar10:{cifar10.parent}", size=None, seed=0)
    assert (len(source.train), len(source.held_out), source.shape) == (20, 4, (3, 32, 32))
    assert source.classes[9] == "kind 9"
    raw = [pickle.loads((cifar10 / f"data_batch_{number}").read_bytes()) for number in range(1, 6)]
    pixels = torch.tensor(numpy.concatenate([batch["data"] for batch in raw])).view(20, 3, 32, 32) / 255
    mean = torch.tensor((0.4914, 0.4822, 0.4465))[:, None, None]
    std = torch.tensor((0.2470, 0.2435, 0.2616))[:, None, None]
    plain = open_source(f"cifar10:{cifar10}", size=None, seed=0, augment=False).train
    torch.testing.assert_close(plain[0, 17][0], (pixels[17] - mean) / std)
    assert plain[0, 17][1] == raw[4]["labels"][1]
    # Each training item is a crop of the padded image, as it is or mirrored.
    mirrored = 0
    for index in range(20):
        black = torch.nn.functional.pad(pixels[index], [4] * 4)
        item = source.train[0, index][0] * std + mean
        crops = [black[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        as_it_is, flipped = (
            any(torch.allclose(crop, image, atol=1e-5) for crop in crops) for image in (item, item.flip(-1))
        )
        assert as_it_is != flipped
        mirrored += flipped
    assert 3 < mirrored < 17
    enlarged = open_source(f"cifar10:{cifar10}", size=48, seed=0)
    assert enlarged.shape == (3, 48, 48) == enlarged.train[0, 0][0].shape == enlarged.held_out[0, 0][0].shape


def test_a_damaged_cifar10(cifar10):
    with (cifar10 / "data_batch_3").open("ab") as file:
        file.write(b".")
    with pytest.raises(RequestError, match=f"must be in {cifar10}, and it is missing or damaged: download http"):
        open_source(f"cifar10:{cifar10.parent}", size=None, seed=0)


# ---- networks


def made(name, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--model", name, "--data", "digits", "--device", "cpu", *words])
    return network.make_network(command.settings_of(args, 1), 7, 3)


def test_networks_of_torchvision():
    assert made("torchvision:resnet18")(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert made("torchvision:efficientnet_b0", "--dropout", "0.3").classifier[0].p == 0.3
    with pytest.raises(RequestError, match="torchvision.models has no network 'resnet19'; similar: resnet1"):
        made("torchvision:resnet19")
    with pytest.raises(RequestError, match="cannot build torchvision:resnet18: TypeError: .*stochastic_depth_prob"):
        made("torchvision:resnet18", "--drop-path", "0.1")
