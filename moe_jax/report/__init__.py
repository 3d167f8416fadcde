"""Writes one HTML page on what runs scored and routed.

`inputs` reads run directories, `statistics` and `gain` compute numbers, `plots` draws them,
`sections` and `page` write the page, `build.report` does all of it in order.
"""
