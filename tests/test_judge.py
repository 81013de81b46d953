"""judge.py: its prompts, its crops and its scores; the judge itself is trained by its own command."""
import sys
import types

import numpy as np
import torch

import data
from tests import judge


def perfect(shown):
    """A judge that answers with these things, in this order."""
    class Perfect:
        def kinds_colours(self, pictures):
            assert len(pictures) == len(shown)
            return (torch.tensor([judge.KINDS.index(thing.kind) for thing in shown]),
                    torch.tensor([judge.COLOURS.index(thing.colour) for thing in shown]))
    return Perfect()


def test_prompts_name_one_thing_with_its_colour_and_can_be_read_back():
    drawn = judge.prompts(100, seed=3)
    assert drawn == judge.prompts(100, seed=3)
    assert drawn != judge.prompts(100, seed=4)
    assert all(judge.read_prompt(text) == (kind, colour) for text, kind, colour in drawn)
    assert {kind for _, kind, _ in drawn} == set(judge.KINDS)


def test_the_parts_of_a_picture_show_its_two_things():
    for _, shown in judge.two_prompts(40):
        first, second = judge.halves(data.draw(shown, 64), shown)
        for part, thing in ((first, shown.things[0]), (second, shown.things[1])):
            assert part.shape == (3, 64, 64)
            off = np.abs(part.transpose(1, 2, 0) - np.array(data.COLOURS[thing.colour])).max(2)
            assert (off < 9).mean() > 0.05


def test_scores_count_kinds_colours_and_relations():
    one = [judge.data.Thing("house", "red", 0, 0, 0), judge.data.Thing("cat", "blue", 0, 0, 0)]
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    scores = judge.judge_one(perfect(one), pictures, ["house", "car"], ["red", "blue"])
    assert (scores["kind"], scores["colour"], scores["both"]) == (0.5, 1, 0.5)
    assert scores["table"]["car"][3] == [("cat", 1)]
    wanted = [shown for _, shown in judge.two_prompts(10)]
    right = judge.judge_two(perfect([thing for shown in wanted for thing in shown.things]),
                            torch.zeros(10, 3, 64, 64, dtype=torch.uint8), wanted)
    swapped = judge.judge_two(perfect([thing for shown in wanted for thing in shown.things[::-1]]),
                              torch.zeros(10, 3, 64, 64, dtype=torch.uint8), wanted)
    assert right["all"] == 1
    assert swapped["all"] == swapped["kind"] == 0


def test_pictures_with_captions_are_read_at_64_pixels(tmp_path):
    larger = np.stack([data.draw(data.scene(i), 128) for i in range(3)])
    np.savez(tmp_path / "drawn.npz", pictures=larger, captions=np.array(["a red car", "a cat", "a sun"]))
    pictures, texts = judge.read_pictures(str(tmp_path / "drawn.npz"))
    assert pictures.shape == (3, 3, 64, 64)
    assert texts[0] == "a red car"
    assert np.abs(pictures[0].numpy().astype(int) - data.draw(data.scene(0), 64)).mean() < 2


def test_an_untrained_judge_answers_for_any_batch():
    kinds, colours = judge.Judge().eval().kinds_colours(torch.zeros(5, 3, 64, 64, dtype=torch.uint8))
    assert kinds.shape == colours.shape == (5,)


def test_the_best_of_several_by_a_ranker_are_drawn(monkeypatch):
    """Of four pictures of a prompt that of the highest score; the settings of a CLIP reach the sampler."""
    import sample
    told = {}

    def generate(stage, prompts, seeds, **settings):
        told.update(settings, prompts=prompts)
        return torch.tensor(seeds, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)

    monkeypatch.setattr(sample, "load_stage", lambda *args: None)
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "clip_scores", lambda folder, pictures, *rest: pictures[:, 0, 0, 0] % 4 % 3.0)
    args = types.SimpleNamespace(
        ckpt="run", seed=0, guidance=3.0, sampler="ddim", sample_steps=4, batch_size=2, clip="clip",
        clip_scale=2.0, guidance_interval=(0, 1), rank="clip", best_of=4)
    drawn = judge.draw_prompts(args, ["a", "b"])
    assert drawn[:, 0, 0, 0].tolist() == [2, 6]
    assert told["prompts"] == ["a"] * 4 + ["b"] * 4
    assert (told["clip"], told["clip_scale"]) == ("clip", 2.0)


# ------------------------------------------------------------------------------ what is written in pictures


def test_words_to_read_back_are_unseen_and_their_letters_are_found_where_they_are():
    source = judge.lettered(judge.PROMPTS)
    shown = [next(source)[1] for _ in range(20)]
    pictures = torch.from_numpy(np.stack([data.draw(scene, 64) for scene in shown]))
    parts, owners = judge.glimpses(pictures, shown, torch.zeros(20, 2))
    counts = [len(scene.word.replace("\n", "")) for scene in shown]
    assert [owners.count(i) for i in range(20)] == counts
    assert parts.shape == (sum(counts), 1, 24, 24)
    moved, _ = judge.glimpses(pictures, shown, torch.ones(20, 2))
    middle = parts[:, 0, 6:18, 6:18].flatten(1).std(1)
    assert middle.min() > 0.2                                                   # there is ink
    assert (parts - moved).abs().amax((1, 2, 3)).min() > 0.1


def test_a_reader_reads_each_picture_at_the_shift_at_which_it_is_surest():
    """Letters are coded by brightness; only where it is not moved is this reader sure."""
    class Sure(torch.nn.Module):
        last = torch.nn.Linear(1, 1)
        calls = 0

        def forward(self, x):
            logits = torch.zeros(len(x), 34)
            logits[:, self.calls] = 9.0 if self.calls == 7 else 1.0             # shift (0, 0)
            self.calls += 1
            return logits

    shown = [data.Scene((), "white", word="AB"), data.Scene((), "white", word="ABC\nD")]
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert judge.read(Sure(), pictures, shown) == [data.ALPHABET[7] * 2, data.ALPHABET[7] * 4]


def test_what_was_read_is_scored_by_place_and_words_are_swapped_among_things_of_a_kind():
    told = judge.read_scores(["CAT", "DOX", "ABCD"], ["CAT", "DOG", "AB\nCD"])
    assert told == "characters 90.0% of 10, wholly right 50.0% of 2 words of 3 characters, 66.7% of all"
    assert judge.read_scores(["C"], ["CAT"]).startswith("characters 33.3% of 3, wholly right 0.0% of 1 ")
    assert judge.by_length(["CAT", "AXCDE", "C"], ["CAT", "ABC\nDE", "CA"]) == (
        "by the longest line: 2 50.0%, 3 87.5%")
    source = judge.lettered(0)
    shown = [next(source)[1] for _ in range(40)]
    others = judge.swapped(shown)
    assert sorted(scene.word for scene in others) == sorted(scene.word for scene in shown)
    assert [scene.things for scene in others] == [scene.things for scene in shown]
    assert sum(a.word != b.word for a, b in zip(shown, others)) > 35


def test_a_public_ocr_is_read_where_the_letters_are_in_their_order_and_letters(monkeypatch):
    """Lower case, a 0 for an O; of a cup no handle."""
    shown = [judge.usual(data.Scene((data.Thing("cup", "red", 0.5, 0.5, 0.42),), "white", word="OK\nAB"))]
    rows = sorted({y for _, _, y, _ in data.letters(shown[0])})

    class RapidOCR:
        def __init__(self, **options):
            pass

        def __call__(self, picture):
            assert picture.shape == (256, 256, 3)
            assert picture[0, 0].tolist() == [3, 2, 1]
            middle = data.letters(shown[0])[0][1] * 256 + 10
            box = lambda x, y: [[x - 9, y - 4], [x + 9, y - 4], [x + 9, y + 4], [x - 9, y + 4]]
            return [(box(middle, 256 * rows[1]), "a b", 0.9), (box(230, 128), "D", 0.9),
                    (box(middle, 256 * rows[0]), "0k", 0.9)], None

    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", types.SimpleNamespace(RapidOCR=RapidOCR))
    picture = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert judge.public_ocr(picture, shown) == ["OKAB"]
