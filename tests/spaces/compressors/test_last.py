"""One answer is kept, and never two."""

import gc
import weakref

import torch

from apportion.spaces.compressors.last import Last


def counting():
    asked, answers = [], []

    @Last
    def double(tensor, times=2):
        asked.append(times)
        assert not [ref for ref in answers if ref() is not None]
        answer = tensor * times
        answers.append(weakref.ref(answer))
        return answer

    return double, asked


def test_same_question_is_answered_once():
    double, asked = counting()
    tensor = torch.ones(2)
    assert double(tensor, times=3) is double(tensor, times=3)
    assert asked == [3]


def test_an_equal_tensor_is_another_question_and_its_answer_replaces_the_first():
    double, asked = counting()
    for tensor in (torch.ones(2), torch.ones(2)):
        double(tensor)
        double(tensor)
    assert asked == [2, 2]


def test_other_arguments_are_another_question():
    double, asked = counting()
    tensor = torch.ones(2)
    for times in (2, 3, 2):
        assert double(tensor, times=times).tolist() == [times, times]
    assert asked == [2, 3, 2]


def test_forgotten_answer_is_gone():
    double, _ = counting()
    answer = weakref.ref(double(torch.ones(2)))
    gc.collect()
    assert answer() is not None
    double.forget()
    assert answer() is None


def test_answers_of_two_functions_are_not_kept_together():
    (double, _), (other, _) = counting(), counting()
    tensor = torch.ones(2)
    answer = weakref.ref(double(tensor))
    other(tensor)
    assert answer() is None
