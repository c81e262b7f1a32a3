"""fcclip inside other frameworks; no other room imports this one.

detectron2/  a real detectron2: registries, catalogs, configs, trainer and evaluators (needs detectron2)
"""
