//! The customer edits a sealed VM file: what he wrote is sealed, or kept where only he can read it.

use fealty_tests::lab::{LIMIT, Lab, Plan};
use fealty_tests::process::{Ended, program, run};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `vm edit` with an editor that is a line of shell about `$1`.
fn edit(lab: &Lab, editor: &str, more: &[&str]) -> Ended {
    let script = lab.path("editor");
    std::fs::write(&script, format!("#!/bin/sh\n{editor}\n")).expect("written");
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("changed");
    let (file, profile, url) = (lab.text("store/payroll.vm"), lab.text("keys/admin.json"), lab.url());
    let mut command = Command::new(program("fealty-keys"));
    command.args(["--profile", &profile, "--url", &url, "vm", "edit", &file]).args(more);
    command.env("EDITOR", script).env("XDG_RUNTIME_DIR", lab.path("memory")).current_dir(lab.dir.path());
    run(&mut command, LIMIT)
}

/// The file that the one line of a refused edit names.
#[track_caller]
fn kept(ended: Ended, words: &str) -> PathBuf {
    let ended = ended.refused();
    assert!(ended.err.lines().count() == 1 && ended.err.contains(words), "{}", ended.err);
    let path = ended.err.split("--from ").nth(1).and_then(|rest| rest.split(", or remove it").next());
    let path = PathBuf::from(path.expect("a path"));
    let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().expect("a folder"))), (0o600, 0o700));
    path
}

#[test]
fn what_was_edited_is_sealed_or_kept() {
    let lab = Lab::new(&Plan { words: "hello,poweroff".into(), ..Plan::default() });
    let memory = lab.path("memory");
    std::fs::create_dir(&memory).expect("a folder");
    let left = || std::fs::read_dir(&memory).expect("a folder").count();
    edit(&lab, r#"sed -i s/hello,poweroff/info,poweroff/ "$1""#, &[]).good();
    assert!(lab.run_vm(&[]).good().out.contains("info entry="));
    assert!(edit(&lab, "true", &[]).good().out.contains("nothing was changed"));
    assert!(edit(&lab, "false", &[]).refused().err.contains("nothing was changed"));
    assert_eq!(left(), 0);

    // A slip of the pen; then what is JSON and no configuration.
    let sealed = std::fs::read(lab.path("store/payroll.vm")).expect("read");
    let first = kept(edit(&lab, r#"sed -i -e s/info,poweroff/initrd,poweroff/ -e '$ d' "$1""#, &[]), "is not JSON");
    let from = first.display().to_string();
    let second = kept(edit(&lab, r#"echo '}' >>"$1"; sed -i s/boot_vcpus/boots/ "$1""#, &["--from", &from]), "boots");
    assert!(std::fs::read(lab.path("store/payroll.vm")).expect("read") == sealed, "the file was changed");
    std::fs::remove_file(&first).expect("removed");
    std::fs::remove_dir(first.parent().expect("a folder")).expect("nothing else is there");
    let from = second.display().to_string();
    edit(&lab, r#"sed -i s/boots/boot_vcpus/ "$1""#, &["--from", &from]).good();
    assert_eq!(left(), 0, "what was kept is sealed now");
    assert!(lab.run_vm(&[]).good().out.contains("failed initrd"), "the guest does what was edited first");
}
