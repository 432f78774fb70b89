"""nbgrader's settings for this repository: solutions/ is its source, exercises/ its release.

Read by nbgrader's own commands and by JupyterLab's *Validate* button; tools/ loads it, too, so that all agree.
"""

c = get_config()  # noqa: F821 - nbgrader puts it there

c.CourseDirectory.course_id = "infra-rephrased"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"
# Source and release have no learners, whose folder nbgrader then calls ".": exercises/./01_numbers/01_numbers.ipynb.
c.CourseDirectory.directory_structure = "{nbgrader_step}/{student_id}/{assignment_id}"

# A learner's endless loop ends here, and the cells after it still run.
TIMEOUT = 30  # seconds
c.Execute.timeout = TIMEOUT
c.Execute.interrupt_on_timeout = True
c.Execute.error_on_timeout = {
    "ename": "CellTimeoutError",
    "evalue": "this cell ran too long and was stopped: is there an endless loop?",
    "traceback": ["CellTimeoutError: this cell ran too long and was stopped: is there an endless loop?"],
}
c.Execute.extra_arguments = ["--IPKernelApp.log_level=ERROR"]

c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError()"}
