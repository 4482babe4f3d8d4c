"""Jobs on a cluster: submission, preflight, requeue, job log, snapshots of code and config.

Entry points: `submit.submit`, `preflight.check_run`.
"""
