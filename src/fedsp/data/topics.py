"""Topics found in questions, so that text without a column of its own can be divided unevenly."""

from __future__ import annotations

from functools import lru_cache

from fedsp.errors import DataError, require_installed


@lru_cache(maxsize=8)
def find_topics(
    train: tuple[str, ...], test: tuple[str, ...], *, count: int, seed: int
) -> tuple[list[str], list[str]]:
    """The topic of each training and each test question: k-means on the leading components of
    TF-IDF (latent semantic analysis), as scikit-learn documents it for the clustering of text,
    fitted on the training questions alone. Kept for the other runs of a study.

    Raises:
        DataError: scikit-learn is not installed, or there are fewer different questions than
            topics.
    """
    require_installed("study", "partition.topics needs", "sklearn", error=DataError)
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    if len(set(train)) < count:
        raise DataError(
            f"partition.topics = {count}, but there are only {len(set(train))} different questions"
        )
    try:
        vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit(train)
        components = max(1, min(50, len(vectors.vocabulary_) - 1, len(train) - 1))
        clusters = make_pipeline(
            vectors,
            TruncatedSVD(components, random_state=seed),
            Normalizer(copy=False),
            KMeans(count, n_init=5, random_state=seed),
        )
        found = clusters.fit_predict(train)
    except ValueError as error:
        raise DataError(
            f"partition.topics = {count}: no topics can be found in these questions"
            f" ({str(error).splitlines()[0]})"
        ) from error
    return [f"topic-{topic}" for topic in found], [
        f"topic-{topic}" for topic in (clusters.predict(test) if test else [])
    ]
