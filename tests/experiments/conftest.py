"""What every experiment's claims and figures are to be."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def presented(tmp_path):
    """A function that draws an experiment's figures, checks the claims' texts, and returns them."""

    def check(module, name, dataset):
        found = module.claims(dataset)
        texts = [(c.plain_words, c.source_short, c.measured_short) for c in found]
        assert not any(text.endswith("…") for row in texts for text in row)
        figures = module.figures(dataset)
        for key, fig in figures.items():
            assert isinstance(fig, Figure)
            assert fig.caption
            fig.savefig(tmp_path / f"{key}.svg")
        assert {claim.evidence for claim in found} <= {f"{name}/{key}" for key in figures}
        return {claim.id: claim.verdict for claim in found}

    return check
