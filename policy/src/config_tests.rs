//! Configurations that are good, and those that no machine has.

use super::*;

fn plain(text: &str) -> Result<PlainConfig, serde_json::Error> {
    serde_json::from_str(text)
}

#[test]
fn a_plain_configuration_can_carry_nothing_protected() {
    let good = r#"{"cpus":{"boot_vcpus":1},"memory":{"size":134217728},"payload":{"kernel":"k"}}"#;
    assert!(plain(good).is_ok_and(|c| c.check().is_ok()));
    for field in ["customer", "provider", "providers", "trust", "key", "volume", "networks"] {
        let bad = good.replacen('{', &format!("{{\"{field}\":\"x\","), 1);
        assert!(plain(&bad).is_err(), "{field}");
    }
    let disk = good.replacen('{', r#"{"disks":[{"id":"a","path":"p","volume":"x"}],"#, 1);
    assert!(plain(&disk).is_err());
}

#[test]
fn what_no_machine_has_is_refused() {
    let good = PlainConfig {
        cpus: Cpus { boot_vcpus: 1, baseline: CpuBaseline::Host },
        memory: Memory { size: 128 << 20, hotplug_size: 0, hugepages: false, hugepage_size: None, thp: false },
        payload: PlainPayload { kernel: "k".into(), initramfs: None, cmdline: String::new() },
        disks: vec![],
        net: vec![],
        rng: None,
        vsock: None,
        balloon: None,
        console: None,
        pvpanic: false,
    };
    let mut bad = good.clone();
    bad.cpus.boot_vcpus = 0;
    assert_eq!(bad.check(), Err(ConfigError::Cpus(0)));
    let mut bad = good.clone();
    bad.memory.size += 1;
    assert!(matches!(bad.check(), Err(ConfigError::Memory(_))));
    let mut bad = good;
    bad.payload.cmdline = "x".repeat(2048);
    assert_eq!(bad.check(), Err(ConfigError::CommandLine));
}

#[test]
fn a_disk_is_what_a_disk_can_be() {
    let check = |fields: &str| {
        let disk = format!(r#"{{"disks":[{{"id":"a","path":"p"{fields}}}],"#);
        let text = r#"{"cpus":{"boot_vcpus":1},"memory":{"size":134217728},"payload":{"kernel":"k"}}"#;
        plain(&text.replacen('{', &disk, 1)).map(|config| config.check().map(|()| config.disks))
    };
    let disks = check("").expect("JSON").expect("a good disk");
    assert_eq!((disks[0].num_queues, disks[0].queue_size), (1, 256));
    assert_eq!(
        serde_json::to_value(&disks[0]).expect("data"),
        serde_json::json!({"id": "a", "path": "p", "readonly": false})
    );
    let limits = r#"{"bandwidth":{"size":1,"refill_time":1},"ops":{"size":9,"one_time_burst":5,"refill_time":1000}}"#;
    let good = format!(r#","num_queues":16,"queue_size":1024,"serial":"A 1","rate_limiter_config":{limits}"#);
    assert!(check(&good).expect("JSON").is_ok());
    for queues in ["0", "17"] {
        assert!(matches!(check(&format!(r#","num_queues":{queues}"#)), Ok(Err(ConfigError::Queues(..)))), "{queues}");
    }
    for size in ["0", "8", "100", "2048"] {
        assert!(matches!(check(&format!(r#","queue_size":{size}"#)), Ok(Err(ConfigError::QueueSize(..)))), "{size}");
    }
    for serial in ["", "123456789012345678901", "ä", "\\n"] {
        assert!(matches!(check(&format!(r#","serial":"{serial}""#)), Ok(Err(ConfigError::Serial(_)))), "{serial}");
    }
    for bucket in [r#""size":0,"refill_time":1"#, r#""size":1,"refill_time":0"#, r#""size":1,"refill_time":3600001"#] {
        for kind in ["bandwidth", "ops"] {
            let text = format!(r#","rate_limiter_config":{{"{kind}":{{{bucket}}}}}"#);
            assert!(matches!(check(&text), Ok(Err(ConfigError::Rate(_)))), "{text}");
        }
    }
    assert!(check(r#","rate_limiter_config":{"bytes":{}}"#).is_err());
}

#[test]
fn baselines_and_pages_have_names_and_bounds() {
    let with = |cpus: &str, memory: &str| {
        let text = format!(r#"{{"cpus":{{"boot_vcpus":1{cpus}}},"memory":{{{memory}}},"payload":{{"kernel":"k"}}}}"#);
        plain(&text).map_err(|_| None).and_then(|c| c.check().map_err(Some))
    };
    let small = r#""size":134217728"#;
    for name in ["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"] {
        assert_eq!(with(&format!(r#","baseline":"{name}""#), small), Ok(()));
    }
    assert_eq!(with(r#","baseline":"x86-64-v5""#, small), Err(None));
    for good in [r#","hugepages":true"#, r#","hugepages":true,"hugepage_size":2097152"#, r#","thp":true"#] {
        assert_eq!(with("", &format!("{small}{good}")), Ok(()));
    }
    for bad in [
        r#","hugepage_size":2097152"#,
        r#","hugepages":true,"hugepage_size":4096"#,
        r#","hugepages":true,"hugepage_size":1073741824"#,
    ] {
        assert_eq!(with("", &format!("{small}{bad}")), Err(Some(ConfigError::HugePages)), "{bad}");
    }
    assert_eq!(with("", &format!(r#"{small},"hugepages":true,"thp":true"#)), Err(Some(ConfigError::TwoKinds)));
    let mut balloon = plain(
        r#"{"cpus":{"boot_vcpus":1},"memory":{"size":134217728,"hugepages":true},"payload":{"kernel":"k"},"balloon":{"size":0}}"#,
    )
    .expect("JSON");
    assert_eq!(balloon.check(), Err(ConfigError::HugeBalloon));
    balloon.memory.hugepages = false;
    assert_eq!(balloon.check(), Ok(()));
}

#[test]
fn names_stay_in_their_folder() {
    for bad in ["", ".", "..", "a/b", ".hidden", "-x", "a\0", "a b"] {
        assert!(FileName::try_from(bad.to_owned()).is_err(), "{bad}");
    }
    assert!(FileName::try_from("vmlinuz-6.1.0_x.img".to_owned()).is_ok());
}
