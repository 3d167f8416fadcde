"""What was learned: `python -m moe_jax.report` turns run directories into one HTML page.

`inputs` reads run directories, `statistics` and `gain` compute numbers, `plots` draws them,
`sections` and `page` write the page, `build.report` does all of it in order.
"""
