"""The synthetic world: rendered faces driven by action units, utterances, dialogues and events.

Entry points: `scene.draw_monologue`, `scene.draw_dialogue_scene`, `scene.film`, `pairs.draw_pair`.
"""
