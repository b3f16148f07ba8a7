# SPDX-License-Identifier: Apache-2.0
"""EQ-T and EQ-R against closed forms, and on our own untrained generators."""
import math

import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics import image_motion, latents
from metrics.equivariance import equivariance
from tests.closeness import approx, assert_close
from tests.metrics.generators import LinearGenerator, Waves, phase_decibels, source, stem

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
ALL = ("eqt_int", "eqt_frac", "eqr")


def measure(G, keys=ALL, num=4, **settings):
    return equivariance(source(G, num, **settings), keys, CPU)


def shifted(pixels, resolution=64):
    """A fault: the picture lands `pixels` too far to the right, seen from the picture."""
    def fault(m):
        m = m.clone()
        is_moved = (m - torch.eye(3)).abs().amax(dim=(1, 2)) > 0
        m[:, 0, 2] -= is_moved * pixels / resolution
        return m
    return fault

#----------------------------------------------------------------------------

class TestKnownGenerators:
    def test_exact_transforms(self):
        # Three waves of 5 periods per 64 pixels: only the filters of the measurement are in the way.
        values = measure(Waves(waves=3))
        assert values["eqt_int"] > 110
        assert values["eqt_frac"] > 60
        assert values["eqr"] > 90

    def test_finer_pictures_meet_the_limit_of_the_filters(self):
        coarse, fine = measure(Waves(frequency=4.0)), measure(Waves(frequency=26.0))
        assert fine["eqt_int"] > 100
        assert 15 < fine["eqt_frac"] < 50 < coarse["eqt_frac"]
        assert 25 < fine["eqr"] < 90 < coarse["eqr"]

    def test_a_deaf_input(self):
        values = measure(Waves(fault=lambda m: torch.eye(3, dtype=torch.float64).expand_as(m)), num=12)
        assert all(value < 15 for value in values.values())

    @pytest.mark.parametrize(("key", "tolerance"), [("eqt_int", 1e-3), ("eqt_frac", 0.2), ("eqr", 0.05)])
    @pytest.mark.parametrize("pixels", [0.25, 2.0])
    def test_off_by_a_known_shift(self, key, tolerance, pixels):
        G = Waves(frequency=5.0, fault=shifted(pixels))
        expected = phase_decibels(2 * math.pi * G.frequencies[0, 0].item() * pixels / 64)
        assert measure(G, [key])[key] == pytest.approx(expected, abs=tolerance)

    def test_turned_the_wrong_way(self):
        assert measure(Waves(fault=lambda m: m.transpose(1, 2)), ["eqr"])["eqr"] < 20
        backwards = Waves(fault=torch.linalg.inv)
        assert all(value < 20 for value in measure(backwards).values())

    def test_ranges_of_the_draws(self, monkeypatch):
        monkeypatch.setattr(image_motion, "rotation_kernels", lambda matrices: torch.zeros(1, 1, 1, 1))
        monkeypatch.setattr(image_motion, "transform_filtered", lambda images, *_: image_motion.shift_whole(
            images, torch.zeros(len(images), 2).long()))
        seen = []
        measure(Waves(resolution=16, fault=lambda m: (seen.append(m.clone()), m)[1]), num=100)
        still, whole, fraction, angle = (torch.cat(seen[i::4]) for i in range(4))
        assert torch.equal(still, torch.eye(3, dtype=torch.float64).expand_as(still))
        for shifts in (whole, fraction):
            assert (shifts[:, :2, 2].abs() <= 1 / 8 + 1e-6).all()
            assert (shifts[:, :2, 2].amin(dim=0) < -0.1).all()
            assert (shifts[:, :2, 2].amax(dim=0) > 0.1).all()
        assert torch.equal(whole[:, :2, 2] * 16, (whole[:, :2, 2] * 16).round())
        angles = torch.atan2(angle[:, 1, 0], angle[:, 0, 0])
        assert angles.max() > 2.8
        assert angles.min() < -2.8
        assert len(torch.unique(angles)) == 100

#----------------------------------------------------------------------------

class TestOurGenerators:
    def test_what_is_built_in(self):
        """Untrained ones do what their layers allow: T moves, R also turns."""
        t, r = (measure(stem(rotation), num=4) for rotation in (False, True))
        assert min(t["eqt_int"], t["eqt_frac"], r["eqt_int"], r["eqt_frac"]) > 60
        assert r["eqr"] > 60
        assert r["eqr"] > t["eqr"] + 20

    def test_the_generator_is_left_as_it_was(self):
        G = stem(False, 16, 6).train()
        G.synthesis.input.transform[0, 2] = 0.3
        buffer, state = G.synthesis.input.transform, {k: v.clone() for k, v in G.state_dict().items()}
        first = measure(G, num=3)
        assert G.synthesis.input.transform is buffer
        assert all(torch.equal(x, state[name]) for name, x in G.state_dict().items())
        assert G.training
        G.synthesis.input.transform.copy_(torch.eye(3))
        assert measure(G, num=3) == first               # It starts from the unmoved input, whatever was there.

    def test_also_after_a_failure(self):
        G = stem(False, 16, 6)
        buffer = G.synthesis.input.transform
        G.synthesis.input.weight.fill_(math.nan)
        with pytest.raises(UserError, match="non-finite values"):
            measure(G, num=2)
        assert G.synthesis.input.transform is buffer

    def test_classes(self):
        assert measure(stem(False, 16, 6, c_dim=3), ["eqt_int"], num=5)["eqt_int"] > 30

#----------------------------------------------------------------------------

class TestReproducible:
    def test_seed(self):
        G = Waves(resolution=32, frequency=9.0)
        assert measure(G) == measure(G)
        assert measure(G)["eqr"] != measure(G, seed=1)["eqr"]

    def test_keys_do_not_move_each_other(self):
        G = Waves(resolution=32, frequency=9.0)
        together = measure(G)
        assert {key: measure(G, [key])[key] for key in reversed(ALL)} == together

    def test_chunks(self, monkeypatch):
        whole = measure(stem(True, 16, 6), num=7)
        monkeypatch.setattr(latents, "MAX_CHUNK", 4)
        parts = measure(stem(True, 16, 6), num=7)
        # Moved by whole pixels, images of this network differ by 1.3e-6 in float64, too: 124 dB. In both images, values
        # of about 1 pass nine stages and are rounded as often, with a mean square error of u^2 / 3, u = 2^-24. That is
        # 1.5e-7, or 12 % of the difference. In a random direction it adds 1.4 % of energy, which is 0.06 dB.
        assert parts.pop("eqt_int") == approx(whole.pop("eqt_int"), abs=0.06)
        assert parts == approx(whole, rel=1e-4)      # Rounding inside the network.

    def test_chunk_size_follows_the_resolution_alone(self):
        assert [latents.chunk_size(r) for r in (16, 64, 256, 1024, 2048)] == [64, 64, 16, 4, 4]


class TestRefusals:
    def test_no_movable_input(self):
        G = LinearGenerator()
        G.synthesis = torch.nn.Module()
        with pytest.raises(UserError, match="cannot be moved"):
            measure(G)

    def test_too_small_for_the_filter(self):
        with pytest.raises(UserError, match="eqr: images of 8 pixels"):
            measure(Waves(resolution=8))

    def test_pictures_of_one_colour_are_finite(self):
        G = Waves(resolution=32, frequency=0.0)
        assert all(math.isfinite(value) for value in measure(G).values())

#----------------------------------------------------------------------------

def noise(num=2, size=24, seed=0):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


class TestMotion:
    def test_whole_pixels(self):
        images = noise()
        moved, mask = image_motion.shift_whole(images, torch.tensor([[3, -2], [0, 5]]))
        assert torch.equal(moved[0, :, :-2, 3:], images[0, :, 2:, :-3])
        assert torch.equal(moved[1, :, 5:], images[1, :, :-5])
        assert mask[0].sum() == 22 * 21
        assert mask[0, :-2, 3:].all()
        assert mask[1, 5:].all()
        assert mask[1].sum() == 19 * 24

    def test_lanczos_at_whole_pixels_is_the_same(self):
        images, shifts = noise(), torch.tensor([[3, -2], [0, 5]])
        expected, _ = image_motion.shift_whole(images, shifts)
        moved, mask = image_motion.shift_lanczos(images, shifts.double())
        assert_close(moved * mask[:, None], expected * mask[:, None], atol=1e-5, rtol=0)

    def test_lanczos_mask_and_mean(self):
        moved, mask = image_motion.shift_lanczos(torch.ones(1, 3, 24, 24), torch.tensor([[2.5, -1.25]]).double())
        assert_close(moved * mask[:, None], mask[:, None] * torch.ones_like(moved), rtol=1.3e-6, atol=1e-5)
        # To the right by 2.5: six pixels around x - 2.5, the first of which is x - 5. Down by -1.25: y - 1 to y + 4.
        assert torch.equal(mask[0].any(dim=0), (torch.arange(24) >= 5))
        assert torch.equal(mask[0].any(dim=1), (torch.arange(24) >= 1) & (torch.arange(24) <= 19))

    def test_lanczos_by_its_definition(self):
        image, shift = noise(1), np.array([1.7, -0.4])
        moved, _mask = image_motion.shift_lanczos(image, torch.from_numpy(shift[None]))

        def kernel(d):
            return np.where(abs(d) < 3, np.sinc(d) * np.sinc(d / 3), 0)
        x, y = 12, 10
        wx, wy = kernel(x - shift[0] - np.arange(24)), kernel(y - shift[1] - np.arange(24))
        expected = (wy / wy.sum()) @ image[0, 1].double().numpy() @ (wx / wx.sum())
        assert moved[0, 1, y, x].item() == approx(expected, abs=1e-5)

    def test_a_quarter_turn_moves_no_sample(self):
        # From x towards y, that is clockwise: the content comes from R @ p.
        images, quarter = noise(1), image_motion.rotations(torch.tensor([math.pi / 2]))
        kernels = image_motion.rotation_kernels(quarter)
        turned, mask = image_motion.transform_filtered(images, quarter, kernels)
        still, same = image_motion.transform_filtered(images.rot90(1, (2, 3)), torch.eye(2)[None], kernels.flip(2))
        inside = (mask & same)[:, None]
        assert inside.sum() > 100
        assert_close(turned * inside, still * inside, atol=1e-4, rtol=0)

    def test_kernels(self):
        angles = torch.tensor([0.0, 0.4, math.pi / 4])
        kernels = image_motion.rotation_kernels(image_motion.rotations(angles))
        step = image_motion.TABLE_STEPS
        assert kernels.shape == (3, 1, 12 * step + 1, 12 * step + 1)
        sums = kernels.sum(dim=(1, 2, 3)) / step ** 2
        torch.testing.assert_close(sums, torch.ones(3), atol=1e-3, rtol=0)
        assert kernels.flatten(1).argmax(dim=1).tolist() == [kernels[0].numel() // 2] * 3
        other = image_motion.rotation_kernels(image_motion.rotations(-angles))
        assert_close(other, kernels.flip(2), atol=1e-5, rtol=0)

    def test_pixels_whose_kernel_leaves_the_image_are_masked(self):
        images, angle = noise(1, 32), image_motion.rotations(torch.tensor([0.5]))
        kernels = image_motion.rotation_kernels(angle)
        moved, mask = image_motion.transform_filtered(images, angle, kernels)
        framed = torch.nn.functional.pad(images, [8] * 4, value=1e6)
        other, _ = image_motion.transform_filtered(framed, angle, kernels)
        assert 50 < mask.sum() < 32 * 32
        assert_close(other[..., 8:-8, 8:-8] * mask[:, None], moved * mask[:, None], atol=1e-4, rtol=0)
