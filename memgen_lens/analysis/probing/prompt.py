"""What the prompt alone tells: its tokens as sparse features, and the probe on them.

Does not know activations, nor what is done with the probe.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit
from sklearn.preprocessing import StandardScaler

from memgen_lens.core.linear_probe import MAX_ITER


def prompt_features(tokens: Int[np.ndarray, "row pos"]) -> csr_array:
    """Counts of each token and one-hots of the token at each position; padding (-1) is a token of its own.

    Returns:
        One row a prompt, one column a token or (position, token) that occurs: at most ``2 * pos`` entries a row.
    """
    n_rows, n_pos = tokens.shape
    vocabulary, ids = np.unique(tokens, return_inverse=True)
    ids = ids.reshape(tokens.shape)
    at_position = len(vocabulary) * (1 + np.arange(n_pos)) + ids  # [row, pos]
    occurring, columns = np.unique(np.concatenate([ids, at_position], axis=1), return_inverse=True)
    starts = 2 * n_pos * np.arange(n_rows + 1)
    features = csr_array((np.ones(columns.size), columns.ravel(), starts), shape=(n_rows, len(occurring)))
    features.sum_duplicates()
    return features


@dataclass(frozen=True)
class PromptProbe:
    """A fitted logistic regression on `prompt_features`.

    Attributes:
        coef: Weight of each feature as it is (neither centred nor scaled).
        intercept: Margin of a prompt without features.
    """

    coef: Float[np.ndarray, " feature"]
    intercept: float

    def decision_function(self, features: csr_array) -> Float[np.ndarray, " row"]:
        """Margin of each row; above 0 predicts memorization."""
        return features @ self.coef + self.intercept


def fit_prompt_probe(features: csr_array, labels: Bool[np.ndarray, " row"]) -> PromptProbe:
    """``StandardScaler`` + ``LogisticRegression`` of scikit-learn on features whose centred copy is never made.

    scikit-learn centres no sparse features (nearly every zero would become a number), and without centring its
    optimizer takes another path and stops elsewhere within its tolerance. Here the centring is a product: margins are
    ``x/s @ w - (m/s) @ w + b`` for columns of mean m and standard deviation s. The loss and the optimizer with its
    settings are those of ``LogisticRegression(max_iter=2000)``: minimize over w and b
    ``mean(log(1 + exp(margin)) - y * margin) + |w|**2 / (2 * n)``, y = 1 for memorization, n rows, by L-BFGS from zero.
    So the steps are the same up to rounding.

    Args:
        features: What `prompt_features` returned, or some of its rows; both classes occur.
        labels: True for memorization.
    """
    scaler = StandardScaler(with_mean=False).fit(features)
    scale, mean = np.asarray(scaler.scale_), np.asarray(scaler.mean_)
    rows = csr_array(scaler.transform(features))
    columns, shift, y, penalty = rows.T.tocsr(), mean / scale, labels.astype(float), 1 / len(labels)

    def loss_and_gradient(parameters: Float[np.ndarray, " p"]) -> tuple[float, Float[np.ndarray, " p"]]:
        weights, intercept = parameters[:-1], parameters[-1]
        margin = rows @ weights - shift @ weights + intercept
        loss = (np.logaddexp(0, margin) - y * margin).mean() + penalty / 2 * (weights @ weights)
        residual = (expit(margin) - y) / len(y)
        slope = columns @ residual - shift * residual.sum() + penalty * weights
        return float(loss), np.append(slope, residual.sum())

    options = {"maxiter": MAX_ITER, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps}  # scikit-learn's
    start = np.zeros(len(scale) + 1)
    found = minimize(loss_and_gradient, start, method="L-BFGS-B", jac=True, options=options).x
    coef = found[:-1] / scale
    return PromptProbe(coef, float(found[-1] - mean @ coef))
