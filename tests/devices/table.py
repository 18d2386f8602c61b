"""What goes between host and device in a step, by place: counts that may only fall, and the reason of each."""

from __future__ import annotations

COUNTS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "SpectralNewton: between refreshes": (
        {},
        {},
    ),
    "SpectralNewton: refresh": (
        {
            "diagnostics/estimators/symmetric_eigen.py:_tried": 12,
        },
        {},
    ),
    "KroneckerNewton: between refreshes": (
        {},
        {},
    ),
    "KroneckerNewton: refresh": (
        {},
        {},
    ),
    'KroneckerNewton(bandwidth="auto"): between refreshes': (
        {},
        {},
    ),
    'KroneckerNewton(bandwidth="auto"): refresh': (
        {},
        {},
    ),
    "SpectralNewton(PowerLaw): first": (
        {
            "diagnostics/estimators/symmetric_eigen.py:_tried": 4,
            "hessopt/closure/finite.py:gradient_norm": 1,
            "hessopt/spectral/transfer.py:_by_cholesky": 2,
        },
        {},
    ),
    "SpectralNewton(PowerLaw): later": (
        {
            "diagnostics/estimators/symmetric_eigen.py:_tried": 4,
            "hessopt/closure/finite.py:gradient_norm": 1,
            "hessopt/spectral/transfer.py:_by_cholesky": 2,
        },
        {},
    ),
    "NewtonCG: first": (
        {
            "hessopt/closure/objective.py:gradient": 1,
            "hessopt/closure/result.py:check_loss": 1,
            "hessopt/closure/runner.py:_trial_loss": 1,
            "hessopt/newton_cg/optimizer.py:_step": 1,
            "hessopt/newton_cg/record.py:of": 1,
            "hessopt/newton_cg/trial.py:rounding": 1,
            "hessopt/newton_cg/trial.py:search_radius": 1,
            "hessopt/newton_cg/trial.py:trial": 1,
            "hessopt/newton_cg/truncated_cg.py:cut": 1,
            "hessopt/newton_cg/truncated_cg.py:truncated_cg": 11,
        },
        {},
    ),
    "NewtonCG: later": (
        {
            "hessopt/closure/objective.py:gradient": 1,
            "hessopt/closure/result.py:check_loss": 1,
            "hessopt/closure/runner.py:_trial_loss": 1,
            "hessopt/newton_cg/optimizer.py:_step": 1,
            "hessopt/newton_cg/record.py:of": 1,
            "hessopt/newton_cg/trial.py:rounding": 1,
            "hessopt/newton_cg/trial.py:search_radius": 1,
            "hessopt/newton_cg/trial.py:trial": 1,
            "hessopt/newton_cg/truncated_cg.py:cut": 1,
            "hessopt/newton_cg/truncated_cg.py:truncated_cg": 11,
        },
        {},
    ),
    "BandedNewton: first": (
        {
            "diagnostics/autograd/sample_mixing.py:_numbers": 9,
            "diagnostics/autograd/sample_mixing.py:mixes_samples": 1,
            "diagnostics/autograd/tape.py:_check_finite": 2,
            "diagnostics/autograd/tape.py:all_within": 2,
            "diagnostics/estimators/symmetric_eigen.py:_tried": 2,
            "hessopt/banded/damped_step.py:search_step": 2,
            "hessopt/banded/linear_solve.py:least_damping": 1,
            "hessopt/banded/linear_solve.py:solve_positive_definite": 1,
            "hessopt/banded/quadratic_model.py:_total": 3,
            "hessopt/banded/quadratic_model.py:predicted_reduction": 1,
            "hessopt/closure/finite.py:refuse_not_finite": 1,
            "hessopt/closure/output_curvature.py:curvature_roots": 3,
            "hessopt/closure/runner.py:_trial_loss": 1,
            "hessopt/factors/layer_factors.py:_by_sample": 6,
            "hessopt/factors/layer_factors.py:_wrong": 1,
            "hessopt/network/parameter_uses.py:__torch_function__": 1,
        },
        {
            "diagnostics/autograd/sample_mixing.py:_bit_products": 4,
        },
    ),
    "BandedNewton: later": (
        {
            "diagnostics/estimators/symmetric_eigen.py:_tried": 2,
            "hessopt/banded/damped_step.py:search_step": 2,
            "hessopt/banded/linear_solve.py:least_damping": 1,
            "hessopt/banded/linear_solve.py:solve_positive_definite": 1,
            "hessopt/banded/quadratic_model.py:_total": 3,
            "hessopt/banded/quadratic_model.py:predicted_reduction": 1,
            "hessopt/closure/finite.py:refuse_not_finite": 1,
            "hessopt/closure/output_curvature.py:curvature_roots": 3,
            "hessopt/closure/runner.py:_trial_loss": 1,
            "hessopt/factors/layer_factors.py:_by_sample": 6,
            "hessopt/factors/layer_factors.py:_wrong": 1,
            "hessopt/network/parameter_uses.py:__torch_function__": 1,
        },
        {},
    ),
    "BandedNewton(rows=): first": (
        {
            "diagnostics/autograd/sample_mixing.py:_numbers": 9,
            "diagnostics/autograd/tape.py:_check_finite": 1,
            "diagnostics/autograd/tape.py:all_within": 1,
            "hessopt/banded/damped_step.py:search_step": 2,
            "hessopt/banded/linear_solve.py:least_damping": 1,
            "hessopt/banded/linear_solve.py:solve_positive_definite": 1,
            "hessopt/banded/quadratic_model.py:_total": 3,
            "hessopt/banded/quadratic_model.py:predicted_reduction": 1,
            "hessopt/closure/finite.py:refuse_not_finite": 1,
            "hessopt/closure/runner.py:_trial_loss": 1,
            "hessopt/factors/layer_factors.py:_by_sample": 6,
            "hessopt/factors/layer_factors.py:_wrong": 1,
            "hessopt/network/parameter_uses.py:__torch_function__": 1,
        },
        {
            "diagnostics/autograd/sample_mixing.py:_bit_products": 2,
            "hessopt/banded/rows.py:subset": 1,
        },
    ),
    "BandedNewton(rows=): later": (
        {
            "hessopt/banded/damped_step.py:search_step": 2,
            "hessopt/banded/linear_solve.py:least_damping": 1,
            "hessopt/banded/linear_solve.py:solve_positive_definite": 1,
            "hessopt/banded/quadratic_model.py:_total": 3,
            "hessopt/banded/quadratic_model.py:predicted_reduction": 1,
            "hessopt/closure/finite.py:refuse_not_finite": 1,
            "hessopt/closure/runner.py:_trial_loss": 1,
            "hessopt/factors/layer_factors.py:_by_sample": 6,
            "hessopt/factors/layer_factors.py:_wrong": 1,
            "hessopt/network/parameter_uses.py:__torch_function__": 1,
        },
        {
            "hessopt/banded/rows.py:subset": 1,
        },
    ),
    "SaddleEscape(AdamW): first": (
        {
            "diagnostics/estimators/krylov.py:step": 4,
            "diagnostics/estimators/probes.py:_checked": 4,
            "hessopt/closure/finite.py:gradient_norm": 1,
            "hessopt/closure/result.py:check_loss": 2,
            "hessopt/wrappers/base.py:wrapped": 1,
            "hessopt/wrappers/saddle.py:_check": 2,
            "hessopt/wrappers/saddle.py:_decide": 5,
            "hessopt/wrappers/saddle.py:check": 1,
        },
        {
            "diagnostics/estimators/krylov.py:vectors": 1,
            "diagnostics/estimators/lanczos.py:extreme_eigenpairs": 2,
        },
    ),
    "SaddleEscape(AdamW): later": (
        {
            "hessopt/closure/finite.py:gradient_norm": 1,
            "hessopt/closure/result.py:check_loss": 1,
            "hessopt/wrappers/base.py:wrapped": 1,
        },
        {},
    ),
    "HessianOperator @ v: first": (
        {
            "diagnostics/operators/curvature.py:_finite": 1,
        },
        {},
    ),
    "HessianOperator @ v: later": (
        {
            "diagnostics/operators/curvature.py:_finite": 1,
        },
        {},
    ),
    "estimate_metrics: first": (
        {
            "diagnostics/autograd/sample_mixing.py:mixes_samples": 3,
            "diagnostics/autograd/tape.py:_check_finite": 6,
            "diagnostics/autograd/tape.py:all_within": 6,
            "diagnostics/autograd/tape.py:batched_vjp": 2,
            "diagnostics/estimators/symmetric_eigen.py:_tried": 16,
            "diagnostics/graph/graph.py:_run_again": 1,
            "diagnostics/matrix_free/pair_estimates.py:_leading_directions": 2,
            "diagnostics/matrix_free/shared_krylov.py:run": 1,
        },
        {
            "diagnostics/autograd/sample_mixing.py:_bit_products": 5,
            "diagnostics/matrix_free/pair_estimates.py:_samples": 1,
            "diagnostics/matrix_free/pair_estimates.py:draw": 2,
        },
    ),
    "estimate_metrics: later": (
        {
            "diagnostics/autograd/tape.py:batched_vjp": 6,
            "diagnostics/estimators/symmetric_eigen.py:_tried": 16,
            "diagnostics/matrix_free/pair_estimates.py:_leading_directions": 2,
            "diagnostics/matrix_free/shared_krylov.py:run": 1,
        },
        {
            "diagnostics/matrix_free/pair_estimates.py:_samples": 1,
            "diagnostics/matrix_free/pair_estimates.py:draw": 2,
        },
    ),
    "Monitor.measure: first": (
        {
            "diagnostics/autograd/kernels.py:__torch_function__": 1,
            "diagnostics/autograd/loss_checks.py:check_scalar_loss": 1,
            "diagnostics/autograd/sample_mixing.py:mixes_samples": 3,
            "diagnostics/autograd/tape.py:_check_finite": 6,
            "diagnostics/autograd/tape.py:all_within": 6,
            "diagnostics/autograd/tape.py:batched_vjp": 2,
            "diagnostics/estimators/krylov.py:step": 4,
            "diagnostics/estimators/probes.py:_checked": 4,
            "diagnostics/estimators/symmetric_eigen.py:_tried": 16,
            "diagnostics/graph/graph.py:_run_again": 1,
            "diagnostics/matrix_free/pair_estimates.py:_leading_directions": 2,
            "diagnostics/matrix_free/shared_krylov.py:run": 1,
            "diagnostics/operators/curvature.py:_finite": 4,
            "diagnostics/results/metric_table.py:gap_ratio": 1,
            "diagnostics/training/monitor.py:_eigenvalues": 2,
            "diagnostics/training/monitor.py:_on_host": 2,
        },
        {
            "diagnostics/autograd/sample_mixing.py:_bit_products": 5,
            "diagnostics/estimators/krylov.py:vectors": 1,
            "diagnostics/estimators/lanczos.py:extreme_eigenpairs": 2,
            "diagnostics/matrix_free/pair_estimates.py:_samples": 1,
            "diagnostics/matrix_free/pair_estimates.py:draw": 2,
        },
    ),
    "Monitor.measure: later": (
        {
            "diagnostics/autograd/kernels.py:__torch_function__": 1,
            "diagnostics/autograd/loss_checks.py:check_scalar_loss": 1,
            "diagnostics/autograd/sample_mixing.py:mixes_samples": 3,
            "diagnostics/autograd/tape.py:_check_finite": 6,
            "diagnostics/autograd/tape.py:all_within": 6,
            "diagnostics/autograd/tape.py:batched_vjp": 2,
            "diagnostics/estimators/krylov.py:step": 4,
            "diagnostics/estimators/lanczos.py:checked_start": 1,
            "diagnostics/estimators/probes.py:_checked": 4,
            "diagnostics/estimators/symmetric_eigen.py:_tried": 16,
            "diagnostics/graph/graph.py:_run_again": 1,
            "diagnostics/matrix_free/pair_estimates.py:_leading_directions": 2,
            "diagnostics/matrix_free/shared_krylov.py:run": 1,
            "diagnostics/operators/curvature.py:_finite": 4,
            "diagnostics/results/metric_table.py:gap_ratio": 1,
            "diagnostics/training/monitor.py:_eigenvalues": 2,
            "diagnostics/training/monitor.py:_on_host": 2,
        },
        {
            "diagnostics/autograd/sample_mixing.py:_bit_products": 5,
            "diagnostics/estimators/krylov.py:vectors": 1,
            "diagnostics/estimators/lanczos.py:extreme_eigenpairs": 2,
            "diagnostics/matrix_free/pair_estimates.py:_samples": 1,
            "diagnostics/matrix_free/pair_estimates.py:draw": 2,
        },
    ),
}
"""Reads by the host, and copies to the device, by what is done: :mod:`tests.devices.scenarios`."""

WHY: dict[str, str] = {
    "diagnostics/autograd/kernels.py:__torch_function__": (
        "a functional call that PyTorch decides by a number: momentum of batch statistics, masks"
    ),
    "diagnostics/autograd/loss_checks.py:check_scalar_loss": (
        "a loss that is not finite is refused before anything is measured"
    ),
    "diagnostics/autograd/sample_mixing.py:_bit_products": ("which sample is which bit, made on the host, once a tape"),
    "diagnostics/autograd/sample_mixing.py:_numbers": (
        "which rows belong to which sample, and whether samples mix: once a structure"
    ),
    "diagnostics/autograd/sample_mixing.py:mixes_samples": (
        "whether samples mix decides how products are made: once a structure"
    ),
    "diagnostics/autograd/tape.py:_check_finite": "the first product over a tape has to be finite",
    "diagnostics/autograd/tape.py:all_within": (
        "a batching rule of PyTorch that is wrong is found out at the first product over a tape"
    ),
    "diagnostics/autograd/tape.py:batched_vjp": "products have to be finite; one look at all of them",
    "diagnostics/estimators/krylov.py:step": (
        "the coefficients of a Lanczos vector, whose tridiagonal matrix is solved on the host"
    ),
    "diagnostics/estimators/krylov.py:vectors": "coefficients of Ritz vectors, solved on the host",
    "diagnostics/estimators/lanczos.py:checked_start": "a start that is zero, or not finite, is refused",
    "diagnostics/estimators/lanczos.py:extreme_eigenpairs": (
        "eigenvalues and residuals, solved on the host, become tensors of the device"
    ),
    "diagnostics/estimators/probes.py:_checked": "every product of an operator has to be finite",
    "diagnostics/estimators/symmetric_eigen.py:_tried": (
        "PyTorch waits for the error flag of a decomposition, and its result has to be finite"
    ),
    "diagnostics/graph/graph.py:_run_again": "a network that does not repeat its output is refused",
    "diagnostics/matrix_free/pair_estimates.py:_leading_directions": ("how many directions are worth their products"),
    "diagnostics/matrix_free/pair_estimates.py:_samples": (
        "which nodes were given all unit vectors, known to the host"
    ),
    "diagnostics/matrix_free/pair_estimates.py:draw": (
        "random probes come from the caller's generator, on the host by default"
    ),
    "diagnostics/matrix_free/shared_krylov.py:run": "an iteration ends where the space is exhausted",
    "diagnostics/operators/curvature.py:_finite": "a second derivative that is not finite is an error",
    "diagnostics/results/metric_table.py:gap_ratio": "the number that is returned",
    "diagnostics/training/monitor.py:_eigenvalues": "the numbers that are returned",
    "diagnostics/training/monitor.py:_on_host": "the metrics and their errors, each in one copy",
    "hessopt/banded/damped_step.py:search_step": "the damping of the next trial depends on the loss of this one",
    "hessopt/banded/linear_solve.py:least_damping": "the damping starts from the trace of the curvature",
    "hessopt/banded/linear_solve.py:solve_positive_definite": (
        "a matrix that is not positive definite gets more damping"
    ),
    "hessopt/banded/quadratic_model.py:_total": (
        "the predicted change of the loss, with which the trial's is compared"
    ),
    "hessopt/banded/quadratic_model.py:predicted_reduction": (
        "the predicted change of the loss, with which the trial's is compared"
    ),
    "hessopt/banded/rows.py:subset": "rows are drawn on the host",
    "hessopt/closure/finite.py:gradient_norm": ("a gradient that is not finite is an error before anything is changed"),
    "hessopt/closure/finite.py:refuse_not_finite": (
        "a gradient that is not finite is an error before anything is changed"
    ),
    "hessopt/closure/objective.py:gradient": "its norm is the tolerance of the solve, and it has to be finite",
    "hessopt/closure/output_curvature.py:curvature_roots": (
        "a loss that is not convex is refused; directions without curvature are left out, which changes shapes"
    ),
    "hessopt/closure/result.py:check_loss": "a loss that is not finite is refused before anything is changed",
    "hessopt/closure/runner.py:_trial_loss": "whether a trial is taken depends on its loss",
    "hessopt/factors/layer_factors.py:_by_sample": (
        "rows that are in the samples' order need no sorting; one look a tensor of parameters"
    ),
    "hessopt/factors/layer_factors.py:_wrong": "factors have to agree with back-propagation",
    "hessopt/network/parameter_uses.py:__torch_function__": "a functional call that PyTorch decides by a number",
    "hessopt/newton_cg/optimizer.py:_step": "a radius starts from the length of the gradient",
    "hessopt/newton_cg/record.py:of": "what is reported",
    "hessopt/newton_cg/trial.py:rounding": "what a difference of losses can mean",
    "hessopt/newton_cg/trial.py:search_radius": "the radius of the next trial depends on this one",
    "hessopt/newton_cg/trial.py:trial": "whether a trial is taken depends on the change of the parameters",
    "hessopt/newton_cg/truncated_cg.py:cut": "where the path leaves the radius",
    "hessopt/newton_cg/truncated_cg.py:truncated_cg": (
        "an iteration ends at the radius, at negative curvature, or at the tolerance"
    ),
    "hessopt/spectral/transfer.py:_by_cholesky": ("a Gram matrix that has no Cholesky factor is decomposed otherwise"),
    "hessopt/wrappers/base.py:wrapped": "the loss at which the gradient was taken",
    "hessopt/wrappers/saddle.py:_check": "whether the gradient is small beside what it was",
    "hessopt/wrappers/saddle.py:_decide": "an escape is taken where it lowers the loss",
    "hessopt/wrappers/saddle.py:check": "what is reported",
}
"""Of every place the reason why it cannot do without."""
