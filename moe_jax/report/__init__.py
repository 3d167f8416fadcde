"""Writes one HTML page with the scores and routes of runs.

`inputs` reads run directories, `statistics` and `gain` compute numbers, `plots` draws them,
`sections` and `page` write the page, `build.report` does all of it in order.
"""
