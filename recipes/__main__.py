"""NeMo-Run's command line over the factories of recipes/native.py.

python -m recipes --yes --factory "phi4mini_midtrain(base='models/phi-4-mini')" optim.config.lr=2e-5
"""

if __name__ == "__main__":
    # Here, because Megatron starts a process for every checkpoint that imports this file again.
    from recipes.native import main

    main()
