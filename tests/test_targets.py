"""Targets: class numbers, label texts, ranks, each image's prediction."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcam.errors import UsageError
from onnxcam.labels import Labels
from onnxcam.targets import choose_targets

LOGITS = np.array([[0.1, 3.0, 2.0, -1.0], [5.0, 1.0, 2.0, 2.0]])
LABELS = Labels.of(["tabby, tabby cat", "tiger cat", "plane", "ship"])


def chosen(*wanted: str | int) -> list[list[int]]:
    return choose_targets(wanted, LOGITS, LABELS).tolist()


def test_the_predicted_class_is_that_of_each_image():
    assert chosen("predicted") == [[1], [0]]


def test_ranks_are_those_of_each_image_with_ties_in_order():
    assert chosen("top3") == chosen("TOP-3") == [[1, 2, 0], [0, 2, 3]]


def test_numbers_and_names_are_the_same_class_for_all():
    assert chosen(2, "3", "tabby") == [[2, 3, 0]] * 2
    assert chosen(np.int64(2)) == [[2]] * 2


def test_a_class_asked_for_twice_is_explained_once_in_the_order_asked():
    assert chosen(3, 1, "ship", 3) == [[3, 1]] * 2


def test_targets_that_coincide_for_one_image_only_all_stay():
    assert chosen(1, "predicted") == [[1, 1], [1, 0]]


def test_a_single_logit_has_two_classes_by_its_sign():
    one = np.array([[-2.0], [3.0]])
    assert choose_targets(["predicted"], one, Labels()).tolist() == [[0], [1]]
    assert choose_targets(["top2"], one, Labels()).tolist() == [[0, 1], [1, 0]]
    assert choose_targets([0, 1], one, Labels()).tolist() == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ([4], "there is no class 4: classes run from 0 to 3"),
        ([-1], "there is no class -1"),
        (["top5"], "target 'top5': the model has 4 classes"),
        (["top0"], "the model has 4 classes"),
        (["cat"], "'cat' fits 2 classes"),
        (["tigre cat"], "1 tiger cat"),
        ([""], "no class is called ''"),
        ([], "no target"),
        (["2.5"], "no class is called '2.5'"),
    ],
)
def test_a_target_that_is_none_is_refused(wanted, says):
    with pytest.raises(UsageError, match=says):
        choose_targets(wanted, LOGITS, LABELS)


def test_without_labels_a_name_is_refused_with_advice():
    with pytest.raises(UsageError, match="give a number, or a file with --labels"):
        choose_targets(["cat"], LOGITS, Labels())
