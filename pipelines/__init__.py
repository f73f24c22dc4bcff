"""Code that runs outside the training pods: packing, local services, evaluation, registration and
the ``convoy`` command.
"""
