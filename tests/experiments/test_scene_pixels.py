from scene_pixels import load_pixels, shape_mask

from ta_llava.data.easy_vqa import load_easy_vqa


def test_the_shape_mask_finds_the_shape():
    for scene in load_easy_vqa("train")[:50]:
        pixels = load_pixels(scene)
        mask = shape_mask(pixels)
        assert pixels.shape == (64, 64, 3) and 0.01 < mask.mean() < 0.5
        background = pixels[~mask].astype(int)
        assert (background.max(axis=0) - background.min(axis=0)).max() <= 48
