//! The main job: an attested guest boots, and only its owner's files come out of it.

use fealty_tests::lab::{Lab, Plan};
use fealty_tests::process::Background;
use policy::Digest;
use serde_json::json;

#[test]
fn an_attested_guest_reads_changes_and_flushes_its_encrypted_disk() {
    let plan = Plan { words: "hello,hash,write:7:0xab,flush,poweroff".into(), ..Plan::default() };
    let lab = Lab::new(&plan);
    let ran = lab.run_vm(&[]).good();
    let expected = Digest::of(&plan.disk).to_string();
    assert!(ran.out.contains(&expected), "no {expected} in:\n{}\n{}", ran.out, ran.err);

    let exported = lab.export();
    let mut changed = plan.disk.clone();
    changed[7 * 4096..8 * 4096].fill(0xab);
    assert!(exported == changed, "the exported image is not the old one with block 7 changed");

    let kinds = lab.audit_kinds();
    let at = |kind: &str| kinds.iter().position(|k| k == kind).unwrap_or_else(|| panic!("no {kind} in {kinds:?}"));
    assert!(at("keys-released") < at("report"), "{kinds:?}");
    assert!(kinds.iter().filter(|k| *k == "report").count() >= 2, "it runs, and it ended: {kinds:?}");
    assert!(!kinds.iter().any(|k| k == "report-gap"), "{kinds:?}");
}

#[test]
fn an_encrypted_disk_has_several_queues_and_forgets_what_it_is_told_to() {
    let words =
        "queues,storm:600,discard:600:8,zeroes:620:3,unmap:640:3,flush,verify:600:0,verify:622:0,verify:640:0,poweroff";
    let plan = Plan { words: words.into(), ..Plan::default() };
    let lab = Lab::new(&plan);
    let ran = lab.run_vm(&[]).good();
    for line in [
        "queues 2",
        "storm ok",
        "discard 600 ok",
        "zeroes 620 ok",
        "unmap 640 ok",
        "verify 600 ok",
        "verify 622 ok",
        "verify 640 ok",
    ] {
        assert!(ran.out.contains(line), "no {line} in:\n{}\n{}", ran.out, ran.err);
    }
    let (exported, mut changed) = (lab.export(), plan.disk.clone());
    for range in [600..608, 620..623, 640..643] {
        changed[range.start * 4096..range.end * 4096].fill(0);
    }
    assert!(exported[512 * 4096..] == changed[512 * 4096..], "what the storm left alone is as it was, or zeroes");
}

#[test]
fn a_read_only_disk_stays_as_it_is_and_is_free_at_the_end() {
    let lab = Lab::new(&Plan::default());
    let base: Vec<u8> = (0..1u32 << 20).map(|at| (at >> 9) as u8).collect();
    lab.make_volume("base", &base);
    let disk = |name: &str, readonly: bool| {
        let volume = lab.volume_id(name);
        json!({"id": name, "volume": volume, "readonly": readonly, "anchor_mode": "flush"})
    };
    let words = "hello,disk:1,hash,write:3:0x33,disk:0,write:7:0xab,flush,poweroff";
    lab.seal_disks(words, &[disk("root", false), disk("base", true)]);
    for _ in 0..2 {
        let ran = lab.run_vm(&[]).good();
        assert!(ran.out.contains(&Digest::of(&base).to_string()), "{}\n{}", ran.out, ran.err);
        assert!(ran.out.contains("disk error write:3:0x33"), "{}", ran.out);
        assert!(!ran.err.contains("volume-not-closed"), "{}", ran.err);
        assert_eq!(ran.err.matches("volume-closed").count(), 2, "{}", ran.err);
        assert!(lab.export_volume("base") == base, "somebody wrote");
        assert_eq!(lab.export()[7 * 4096], 0xab);
    }
}

#[test]
fn the_volume_and_the_vm_file_hold_no_plain_text() {
    let marker = b"the quick brown fox is paid a salary";
    let mut disk = vec![0u8; 1 << 20];
    for block in disk.chunks_mut(4096) {
        block[100..100 + marker.len()].copy_from_slice(marker);
    }
    let lab =
        Lab::new(&Plan { disk, words: "hello,secret-word-of-the-command-line,poweroff".into(), ..Plan::default() });
    let holds = |bytes: &[u8], text: &[u8]| bytes.windows(text.len()).any(|w| w == text);
    let image = std::fs::read(lab.path("root.img")).expect("read");
    assert!(holds(&image, marker), "the image itself does hold it");
    let volume = std::fs::read(lab.path("store/root.vol")).expect("read");
    assert!(!holds(&volume, marker));
    let file = std::fs::read(lab.path("store/payroll.vm")).expect("read");
    assert!(!holds(&file, b"secret-word"));
}

#[test]
fn a_guest_that_powers_off_can_start_again_as_the_next_instance() {
    let lab = Lab::new(&Plan { words: "hello,hash,poweroff".into(), ..Plan::default() });
    lab.run_vm(&[]).good();
    lab.run_vm(&[]).good();
    let instances: Vec<u64> =
        lab.audit().iter().filter(|e| e["kind"] == "keys-released").filter_map(|e| e["instance"].as_u64()).collect();
    assert_eq!(instances.len(), 2);
    assert!(instances[1] > instances[0], "{instances:?}");
}

#[test]
fn attack_44_no_key_stands_in_any_output_log_or_file() {
    // The one file that may hold such a secret is the provider's master key.
    let lab = Lab::new(&Plan { words: "hello,hash,poweroff".into(), ..Plan::default() });
    let ran = lab.run_vm(&["--json"]).good();
    let master = std::fs::read(lab.path("keys/master.key")).expect("the master key file");
    let volume = lab.volume_key();
    let audit = lab.audit().iter().map(ToString::to_string).collect::<String>();
    let provider = lab.provider.as_ref().map(|p| p.out() + &p.err()).unwrap_or_default();
    let mut seen: Vec<_> = [("standard output", ran.out), ("standard error", ran.err), ("the audit log", audit)]
        .map(|(name, text)| (std::path::PathBuf::from(name), text.into_bytes()))
        .into();
    seen.push(("the provider".into(), provider.into_bytes()));
    seen.extend(Lab::files(lab.dir.path()).into_iter().chain(Lab::files(lab.run.path())));
    let names: Vec<_> = seen.iter().filter_map(|(path, _)| path.file_name()?.to_str()).collect();
    for looked_at in ["keys.db", "payroll.vm", "root.vol", "state.json", "layers.log"] {
        assert!(names.contains(&looked_at), "{looked_at} is not among {names:?}");
    }
    assert!(seen.iter().any(|(_, bytes)| holds(bytes, &master)), "the master key file itself does hold it");
    for (path, bytes) in seen.iter().filter(|(path, _)| !path.ends_with("keys/master.key")) {
        assert!(!holds(bytes, &master), "the master key in {}", path.display());
        assert!(!holds(bytes, &volume), "the volume's key in {}", path.display());
    }
}

/// Whether half of a key stands in `bytes`, as it is or as text.
fn holds(bytes: &[u8], key: &[u8]) -> bool {
    let base64 = |piece: &[u8]| policy::Base64Url::from(piece).to_string().into_bytes();
    // Three bytes are four characters, and there are two alphabets.
    let plain = |text: &[u8]| {
        text.iter()
            .map(|c| match c {
                b'-' => b'+',
                b'_' => b'/',
                c => *c,
            })
            .collect::<Vec<_>>()
    };
    let mut forms: Vec<Vec<u8>> = key.windows(16).map(<[u8]>::to_vec).collect();
    forms.extend((0..3).map(|at| base64(&key[at..at + 15])));
    forms.extend((0..3).map(|at| plain(&base64(&key[at..at + 15]))));
    forms.push(hex::encode(&key[..16]).into_bytes());
    forms.push(hex::encode_upper(&key[..16]).into_bytes());
    let mut starting: Vec<Vec<&[u8]>> = vec![Vec::new(); 256];
    forms.iter().for_each(|form| starting[usize::from(form[0])].push(form));
    let stands = |at: usize| starting[usize::from(bytes[at])].iter().any(|form| bytes[at..].starts_with(form));
    (0..bytes.len()).any(stands)
}

#[test]
fn every_thread_runs_under_its_filter_and_no_key_can_be_read_by_root() {
    let lab = Lab::new(&Plan { words: "hello,tick".into(), ..Plan::default() });
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("fealty-guest", fealty_tests::lab::LIMIT);
    let tasks = format!("/proc/{}/task", vm.pid());
    let mut threads = 0;
    for task in std::fs::read_dir(tasks).expect("tasks").flatten() {
        // One that has ended meanwhile is none.
        let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
        assert!(status.contains("Seccomp:\t2"), "{status}");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        threads += 1;
    }
    assert!(threads >= 3, "main, vCPU and disk threads at least");
    if !fealty_tests::lab::has_memfd_secret() {
        eprintln!(
            "NOT TESTED: this kernel offers no memfd_secret (secretmem.enable=1 on the command line of older ones)"
        );
        return;
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.pid())).expect("root may read the map");
    let secret: Vec<&str> = maps.lines().filter(|l| l.contains("secretmem")).collect();
    assert!(!secret.is_empty(), "keys lie in memfd_secret pages:\n{maps}");
    let mem = std::fs::File::open(format!("/proc/{}/mem", vm.pid())).expect("root may open it");
    let read_at = |line: &str| {
        let start = u64::from_str_radix(line.split('-').next().unwrap_or_default(), 16).expect("an address");
        std::os::unix::fs::FileExt::read_at(&mem, &mut [0; 16], start)
    };
    for line in &secret {
        assert!(read_at(line).is_err(), "root read {line}");
    }
    let stack = maps.lines().find(|l| l.contains("[stack]")).expect("a stack");
    assert!(read_at(stack).is_ok(), "the same way does read ordinary memory");
}
