"""The vocabulary: tasks, rules, graphs, groups, surgery, networks, costs, experiments."""
