//! The page for users of volumes, `blockcrypt/README.md`: what it tells to type works, from its beginning to its end.

use fealty_tests::keys::{Keys, LIMIT};
use fealty_tests::process::{program, run};
use std::path::Path;
use std::process::Command;

/// What `fealty-disk` can do.
const COMMANDS: [&str; 14] = [
    "create ",
    "import ",
    "export ",
    "info ",
    "check ",
    "snapshot take",
    "snapshot list",
    "snapshot revert",
    "snapshot delete",
    "resize ",
    "clone ",
    "rekey ",
    "rewrap ",
    "erase ",
];

fn page() -> (&'static Path, String) {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../blockcrypt"));
    (folder, std::fs::read_to_string(folder.join("README.md")).expect("a page"))
}

/// What stands between the fences of a shell's blocks.
fn typed(page: &str) -> String {
    let mut script = String::new();
    for block in page.split("```sh\n").skip(1) {
        script.push_str(block.split("```").next().expect("an end"));
    }
    script
}

#[test]
fn what_the_page_tells_to_type_works() {
    let script = typed(&page().1);
    for command in COMMANDS.iter().chain(&["serve ", "bench "]) {
        assert!(script.contains(&format!("fealty-disk {command}")), "the page shows no {command}");
    }
    let keys = Keys::new("");
    // The profile names the port that a provider has where nothing else is asked for.
    let profile = keys.path("keys/admin.json");
    let mut said: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&profile).expect("read")).expect("a profile");
    said["url"] = keys.url().into();
    std::fs::write(&profile, said.to_string()).expect("written");

    let programs = program("fealty-disk");
    let programs = programs.parent().expect("a folder").display();
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("set -euxo pipefail\nexport PATH={programs}:$PATH:/usr/sbin\n{script}")]);
    shell.current_dir(keys.path("")).env("FEALTY_KEYS_PROFILE", &profile);
    run(&mut shell, LIMIT).good();
}

#[test]
fn what_the_page_points_to_is_there() {
    let (folder, page) = page();
    let links: Vec<&str> = page.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap_or("")).collect();
    assert!(links.len() >= 3, "{links:?}");
    for link in links {
        assert!(folder.join(link).exists(), "{link}");
    }
}
