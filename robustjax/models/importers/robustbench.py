"""Which architecture and normalization belong to which id of RobustBench.

Facts read from RobustBench's model zoo (Croce et al., arXiv:2010.09670; version of
March 2025). Its files are those that RobustBench downloads, `<id>.pt`.
"""

from robustjax.models.importers.architectures import Architecture, architecture

_UNIT = ((0.0,), (1.0,))
_HALF = ((0.5,), (0.5,))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
_ENGSTROM = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_RONY = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
_AUGUSTIN = (
    (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
)
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_CIFAR100_CHEN = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_CIFAR100_WU = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)
_FROM_FILE = (None, None)

_Row = tuple[str, tuple, str]
# (data set, threat) -> rows of architecture, normalization, ids.
_TABLE: dict[tuple[str, str], tuple[_Row, ...]] = {
    ("cifar10", "Linf"): (
        ("preact_resnet18_raw", _CIFAR10, "Wong2020Fast"),
        ("preact_resnet18_raw", _UNIT, "Andriushchenko2020Understanding"),
        (
            "resnet18",
            _UNIT,
            "Sehwag2021Proxy_R18 Addepalli2021Towards_RN18 Addepalli2022Efficient_RN18",
        ),
        ("resnet50", _ENGSTROM, "Engstrom2019Robustness"),
        (
            "wide_resnet_28_10",
            _UNIT,
            "Standard Carmon2019Unlabeled Sehwag2020Hydra Wang2020Improving "
            "Wu2020Adversarial_extra Zhang2020Geometry Sridhar2021Robust",
        ),
        ("wide_resnet_28_10", _HALF, "Hendrycks2019Using"),
        (
            "wide_resnet_34_10",
            _UNIT,
            "Zhang2019Theoretically Huang2020Self Zhang2019You Zhang2020Attacks "
            "Wu2020Adversarial Sehwag2021Proxy Sitawarin2020Improving "
            "Cui2020Learnable_34_10 Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 "
            "Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10 "
            "Cui2023Decoupled_WRN-34-10 Chen2024Data_WRN_34_10",
        ),
        ("wide_resnet_34_10", _CIFAR10, "Chen2020Efficient"),
        ("wide_resnet_34_15", _UNIT, "Sridhar2021Robust_34_15"),
        (
            "wide_resnet_34_20",
            _UNIT,
            "Cui2020Learnable_34_20 Chen2021LTD_WRN34_20 Chen2024Data_WRN_34_20",
        ),
        ("wide_resnet_34_20", _CIFAR10, "Rice2020Overfitting"),
        ("wide_resnet_70_16", _UNIT, "Jia2022LAS-AT_70_16"),
        (
            "dm_preact_resnet18",
            _CIFAR10,
            "Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_extra "
            "Rade2021Helper_R18_ddpm Gowal2021Improving_R18_ddpm_100m",
        ),
        (
            "dm_wide_resnet_28_10",
            _CIFAR10,
            "Gowal2020Uncovering_28_10_extra Rebuffi2021Fixing_28_10_cutmix_ddpm "
            "Rade2021Helper_ddpm Gowal2021Improving_28_10_ddpm_100m "
            "Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10 "
            "Xu2023Exploring_WRN-28-10 Cui2023Decoupled_WRN-28-10",
        ),
        ("dm_wide_resnet_34_10", _CIFAR10, "Rade2021Helper_extra"),
        ("dm_wide_resnet_34_20", _CIFAR10, "Gowal2020Uncovering_34_20"),
        (
            "dm_wide_resnet_70_16",
            _CIFAR10,
            "Gowal2020Uncovering_70_16 Gowal2020Uncovering_70_16_extra "
            "Rebuffi2021Fixing_70_16_cutmix_ddpm Rebuffi2021Fixing_70_16_cutmix_extra "
            "Gowal2021Improving_70_16_ddpm_100m Pang2022Robustness_WRN70_16 "
            "Wang2023Better_WRN-70-16",
        ),
        ("dm_wide_resnet_82_8", _CIFAR10, "Bartoldson2024Adversarial_WRN-82-8"),
        ("dm_wide_resnet_94_16", _CIFAR10, "Bartoldson2024Adversarial_WRN-94-16"),
        ("dm_wide_resnet_106_16", _CIFAR10, "Rebuffi2021Fixing_106_16_cutmix_ddpm"),
    ),
    ("cifar10", "L2"): (
        ("preact_resnet18", _CIFAR10, "Rice2020Overfitting"),
        ("resnet18", _UNIT, "Sehwag2021Proxy_R18"),
        ("resnet50", _ENGSTROM, "Engstrom2019Robustness"),
        ("resnet50", _AUGUSTIN, "Augustin2020Adversarial"),
        ("wide_resnet_28_10", _UNIT, "Standard"),
        ("wide_resnet_28_10", _RONY, "Rony2019Decoupling"),
        ("wide_resnet_34_10", _UNIT, "Wu2020Adversarial Sehwag2021Proxy"),
        (
            "wide_resnet_34_10",
            _AUGUSTIN,
            "Augustin2020Adversarial_34_10 Augustin2020Adversarial_34_10_extra",
        ),
        (
            "dm_preact_resnet18",
            _CIFAR10,
            "Rebuffi2021Fixing_R18_cutmix_ddpm Rade2021Helper_R18_ddpm",
        ),
        (
            "dm_wide_resnet_28_10",
            _CIFAR10,
            "Rebuffi2021Fixing_28_10_cutmix_ddpm Wang2023Better_WRN-28-10",
        ),
        (
            "dm_wide_resnet_70_16",
            _CIFAR10,
            "Gowal2020Uncovering Gowal2020Uncovering_extra "
            "Rebuffi2021Fixing_70_16_cutmix_ddpm Rebuffi2021Fixing_70_16_cutmix_extra "
            "Wang2023Better_WRN-70-16",
        ),
    ),
    ("cifar10", "corruptions"): (
        (
            "preact_resnet18",
            _CIFAR10,
            "Kireev2021Effectiveness_Gauss50percent "
            "Kireev2021Effectiveness_AugMixNoJSD Kireev2021Effectiveness_RLAT "
            "Kireev2021Effectiveness_RLATAugMixNoJSD "
            "Kireev2021Effectiveness_RLATAugMix",
        ),
        ("resnet18", _FROM_FILE, "Modas2021PRIMEResNet18"),
        ("wide_resnet_28_10", _UNIT, "Standard"),
        (
            "wide_resnet_34_10",
            _UNIT,
            "Addepalli2021Towards_WRN34 Addepalli2022Efficient_WRN_34_10",
        ),
        ("wide_resnet_40_2", _HALF, "Hendrycks2020AugMix_WRN"),
        (
            "dm_wide_resnet_70_16",
            _CIFAR10,
            "Rebuffi2021Fixing_70_16_cutmix_extra_Linf "
            "Rebuffi2021Fixing_70_16_cutmix_extra_L2",
        ),
    ),
    ("cifar100", "Linf"): (
        ("preact_resnet18", _CIFAR100_WU, "Rice2020Overfitting"),
        ("preact_resnet18", _UNIT, "Addepalli2021Towards_PARN18"),
        ("resnet18", _UNIT, "Addepalli2022Efficient_RN18"),
        ("wide_resnet_28_10", _HALF, "Hendrycks2019Using"),
        (
            "wide_resnet_34_10",
            _UNIT,
            "Cui2020Learnable_34_10_LBGAT0 Cui2020Learnable_34_10_LBGAT6 "
            "Cui2020Learnable_34_10_LBGAT9_eps_8_255 Sehwag2021Proxy "
            "Sitawarin2020Improving Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 "
            "Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10 "
            "Cui2023Decoupled_WRN-34-10 Cui2023Decoupled_WRN-34-10_autoaug "
            "Chen2024Data_WRN_34_10",
        ),
        ("wide_resnet_34_10", _CIFAR100_CHEN, "Chen2020Efficient"),
        ("wide_resnet_34_10", _CIFAR100_WU, "Wu2020Adversarial"),
        (
            "wide_resnet_34_20",
            _UNIT,
            "Cui2020Learnable_34_20_LBGAT6 Jia2022LAS-AT_34_20",
        ),
        (
            "dm_preact_resnet18",
            _CIFAR100,
            "Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_ddpm",
        ),
        (
            "dm_wide_resnet_28_10",
            _CIFAR100,
            "Rebuffi2021Fixing_28_10_cutmix_ddpm Pang2022Robustness_WRN28_10 "
            "Wang2023Better_WRN-28-10 Cui2023Decoupled_WRN-28-10",
        ),
        (
            "dm_wide_resnet_70_16",
            _CIFAR100,
            "Gowal2020Uncovering Gowal2020Uncovering_extra "
            "Rebuffi2021Fixing_70_16_cutmix_ddpm Pang2022Robustness_WRN70_16 "
            "Wang2023Better_WRN-70-16",
        ),
    ),
}
# Under which key these files keep the weights that RobustBench evaluates.
_LAST = ("Kireev2021Effectiveness", "Andriushchenko2020Understanding")


def robustbench(
    model_id: str, dataset: str = "cifar10", threat: str = "Linf"
) -> Architecture:
    """The architecture and normalization of an id of RobustBench.

    An id means different nets under different threats: Rice2020Overfitting is a
    WideResNet-34-20 under Linf and a PreActResNet-18 under L2.

    Args:
        model_id: as in RobustBench, such as "Carmon2019Unlabeled".
        dataset: "cifar10" or "cifar100".
        threat: "Linf", "L2" or "corruptions".

    Returns:
        What `load` and `from_state_dict` take.

    Raises:
        ValueError: on an id whose architecture is none of `ARCHITECTURES` (ensembles,
            transformers, nets with other activations or normalizations).

    >>> robustbench("Rice2020Overfitting", "cifar10", "L2").family
    'preact_resnet18'
    """
    if (dataset, threat) not in _TABLE:
        known = ", ".join(f"({a!r}, {b!r})" for a, b in _TABLE)
        raise ValueError(f"dataset={dataset!r}, threat={threat!r}: known are {known}.")
    rows = _TABLE[dataset, threat]
    for name, (mean, std), ids in rows:
        if model_id in ids.split():
            num_classes = 100 if dataset == "cifar100" else 10
            return architecture(name, num_classes, mean=mean, std=std)
    ids = sorted(" ".join(row[2] for row in rows).split())
    raise ValueError(
        f"model_id={model_id!r} is none of those that can be read for {dataset}, "
        f"{threat}: {', '.join(ids)}."
    )


def robustbench_entry(model_id: str) -> str | None:
    """The `entry` of `load` for an id of RobustBench: "last" for those that need it.

    Args:
        model_id: as in RobustBench.

    >>> robustbench_entry("Andriushchenko2020Understanding")
    'last'
    """
    return "last" if model_id.startswith(_LAST) else None
