"""The App speaks the App's words."""

import pytest

from operators.wording import in_words


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("brain_key='a b' is not a name. Use 'ecif'", "Key 'a b' is not a name. Use 'ecif'"),
        ("or set overwrite=True to replace it", "or tick 'Replace the run' to replace it"),
        (
            "Run compute_influence again with overwrite=True",
            "Run Compute ECIF influence again with 'Replace the run' ticked",
        ),
        ("fit=True avoids that", "Ticking 'Fit the model to these pairs first' avoids that"),
        ("too low: say trained=True", "too low: tick 'The model was trained on these pairs'"),
        ("count=0 must be at least 1", "Pairs 0 must be at least 1"),
        ("Use a smaller batch_size, or device='cpu'", "Use a smaller 'Batch size', or Device 'cpu'"),
        ("Run compute_influence with keep_gradients=True", "Run Compute ECIF influence with scope 'heads'"),
        ("the field ecif_influence of model.pt", "the field ecif_influence of model.pt"),
    ],
)
def test_what_python_says_is_said_in_the_words_of_the_forms(said, words):
    assert in_words(said) == words
