//! Operations on a running VM: free ones are done and reported, restricted ones need the customer.

use fealty_tests::lab::{LIMIT, Lab, POWER_ON_ONLY, Plan, lease};
use fealty_tests::process::{Background, Ended, program, run};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

fn start(lab: &Lab) -> Background {
    let mut vm = Background::start(&mut lab.vm(&["--api-socket", &lab.text("api.sock")]));
    vm.until("tick", LIMIT);
    vm
}

#[track_caller]
fn ctl(lab: &Lab, words: &[&str]) -> Ended {
    let socket = lab.text("api.sock");
    let mut all = vec!["ctl", &socket];
    all.extend(words);
    run(Command::new(program("fealty")).args(all), LIMIT)
}

#[test]
fn a_vm_is_paused_resumed_and_ended_through_its_socket() {
    let lab = Lab::new(&Plan { words: "hello,tick".into(), ..Plan::default() });
    let vm = start(&lab);
    let info = ctl(&lab, &["info"]).good();
    assert!(info.out.to_lowercase().contains("running"), "{}", info.out);
    ctl(&lab, &["info"]).good();
    ctl(&lab, &["pause"]).good();
    let stopped = vm.out().matches("tick").count();
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(vm.out().matches("tick").count(), stopped, "it ran while paused");
    ctl(&lab, &["resume"]).good();
    std::fs::write(lab.path("late.img"), [0; 4096]).expect("written");
    for words in [&["add-disk", "late", &lab.text("late.img")][..], &["remove-device", "root"]] {
        let refused = ctl(&lab, words).refused();
        assert!(refused.err.contains("others need the customer's permission"), "{}", refused.err);
    }
    ctl(&lab, &["shutdown"]).good();
    vm.end(LIMIT).good();
    let log = lab.audit();
    let reports: Vec<String> = log.iter().filter(|e| e["kind"] == "report").map(ToString::to_string).collect();
    // Two looks within a minute are one report.
    for operation in ["vm.info", "vm.pause", "vm.resume", "vm.shutdown"] {
        assert_eq!(reports.iter().filter(|r| r.contains(operation)).count(), 1, "{operation} in {reports:#?}");
    }
}

#[test]
fn a_core_dump_is_refused_by_default_and_sealed_when_permitted() {
    let mut lab = Lab::new(&Plan { words: "hello,tick".into(), ..Plan::default() });
    let vm = start(&lab);
    let refused = ctl(&lab, &["coredump", "--out", &lab.text("core")]).refused();
    assert!(refused.err.contains("policy"), "{}", refused.err);
    assert!(lab.audit_kinds().contains(&"operation-refused".into()));

    let rules = format!("{POWER_ON_ONLY}\npermit (principal, action == Action::\"vm.coredump\", resource);");
    lab.set_policy(&lease(600, 10), &rules);
    ctl(&lab, &["coredump", "--out", &lab.text("core.sealed")]).good();
    let sealed = std::fs::read(lab.path("core.sealed")).expect("the dump");
    assert!(sealed.len() > 1 << 20, "it holds the guest's memory: {}", sealed.len());
    let needle = b"fealty.do=hello";
    assert!(!sealed.windows(needle.len()).any(|w| w == needle), "plain text in the sealed dump");

    lab.keys(&["dump", "open", "acme", "--in", &lab.text("core.sealed"), "--out", &lab.text("core.elf")]).good();
    let core = std::fs::read(lab.path("core.elf")).expect("the opened dump");
    assert_eq!(&core[..4], b"\x7fELF");
    assert!(core.windows(needle.len()).any(|w| w == needle), "the guest's command line stands in its memory");

    let mut touched = sealed;
    let at = touched.len() / 2;
    touched[at] ^= 1;
    std::fs::write(lab.path("core.touched"), touched).expect("written");
    lab.keys(&["dump", "open", "acme", "--in", &lab.text("core.touched"), "--out", &lab.text("core.bad")]).refused();

    ctl(&lab, &["shutdown"]).good();
    vm.end(LIMIT).good();
    let kinds = lab.audit_kinds();
    let before = kinds.iter().position(|k| k == "operation-permitted").expect("a before");
    assert!(kinds[before..].iter().any(|k| k == "report"), "its outcome: {kinds:?}");
    assert!(kinds.contains(&"dump-opened".into()), "{kinds:?}");
}

#[test]
fn a_volume_grows_under_its_guest_where_the_customer_permits_it() {
    let words = "wait-resize,write:1500:0x66,flush,verify:1500:0x66,tick".into();
    let mut lab = Lab::new(&Plan { words, ..Plan::default() });
    let mut vm = Background::start(&mut lab.vm(&["--api-socket", &lab.text("api.sock")]));
    vm.until("waiting for another size", LIMIT);
    let resize = |lab: &Lab, words: &[&str]| ctl(lab, &[&["resize-disk"], words].concat());
    let (larger, as_it_is) = ("8388608", "4194304");
    for (words, why) in [
        (&["root"][..], "it has 4194304 bytes"),
        (&["root", "--size", "1048576"], "while its VM does not run"),
        (&["root", "--size", "8388609"], "multiple of 512"),
        (&["data", "--size", larger], "no disk data"),
    ] {
        let refused = resize(&lab, words).refused();
        assert!(refused.err.contains(why), "{words:?}: {}", refused.err);
    }
    // To the size that it has there is nothing to permit.
    resize(&lab, &["root", "--size", as_it_is]).good();
    let refused = resize(&lab, &["root", "--size", larger]).refused();
    assert!(refused.err.contains("policy"), "{}", refused.err);
    assert!(lab.audit_kinds().contains(&"operation-refused".into()));
    assert!(!vm.out().contains("bytes=8388608"));

    let rule = "permit (principal, action == Action::\"vm.resize-disk\", resource) \
                when { context.parameters.hasTag(\"disk\") && context.parameters.getTag(\"disk\") == \"root\" };";
    lab.set_policy(&lease(600, 10), &format!("{POWER_ON_ONLY}\n{rule}"));
    assert!(resize(&lab, &["root", "--size", larger]).good().out.contains("root has 8388608 bytes"));
    vm.until("verify 1500 ok", LIMIT);
    // The provider hears of it while the VM runs.
    let begun = Instant::now();
    while !lab.keys(&["volume", "list", "acme", "--json"]).good().out.contains("\"size\":8388608") {
        assert!(begun.elapsed() < LIMIT, "the provider does not know the size");
        std::thread::sleep(Duration::from_millis(100));
    }
    ctl(&lab, &["shutdown"]).good();
    let ended = vm.end(LIMIT).good();
    assert!(ended.out.contains("disk 0 bytes=8388608"), "{}", ended.out);
    let log = lab.audit();
    let of = |kind: &str, name: &str, value: &str| {
        log.iter().position(|event| event["kind"] == kind && event["details"][name] == value)
    };
    let before = of("operation-permitted", "parameter.size", larger).expect("a before");
    let after = of("report", "detail", "disk root has 8388608 bytes").expect("an after");
    assert!(before < after && log[after]["details"]["done"] == "true" && log[after]["details"]["permitted"] == "true");
    let exported = lab.export();
    assert_eq!(exported.len(), 8 << 20);
    assert!(exported[1500 * 4096..1501 * 4096].iter().all(|b| *b == 0x66));
    assert!(exported[..4 << 20] == Plan::default().disk);
}

/// Asks for a core dump into a pipe; the pipe's other end, and the connection on which the answer comes.
fn dump_into_pipe(lab: &Lab) -> (OwnedFd, UnixStream) {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let socket = UnixStream::connect(lab.path("api.sock")).expect("a control socket");
    let request = b"PUT /api/v1/fealty/vm.coredump HTTP/1.1\r\nHost: vm\r\nContent-Length: 0\r\n\r\n";
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let writer = [writer.as_fd()];
    assert!(beside.push(SendAncillaryMessage::ScmRights(&writer)));
    let sent = sendmsg(&socket, &[IoSlice::new(request)], &mut beside, SendFlags::empty()).expect("sent");
    assert_eq!(sent, request.len());
    (reader, socket)
}

#[test]
fn a_core_dump_that_nobody_takes_holds_up_neither_the_vm_nor_its_end() {
    let rules = format!("{POWER_ON_ONLY}\npermit (principal, action == Action::\"vm.coredump\", resource);");
    let lab = Lab::new(&Plan { words: "hello,write:5:0x55,tick".into(), rules, ..Plan::default() });
    let mut vm = start(&lab);
    let (_pipe, mut socket) = dump_into_pipe(&lab);
    let mut answer = [0; 4096];
    socket.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let length = socket.read(&mut answer).expect("an answer");
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 500") && answer.contains("nobody took any of it"), "{answer}");
    let ticks = |vm: &Background| vm.out().matches("tick").count();
    let before = ticks(&vm);
    let begun = Instant::now();
    while ticks(&vm) == before {
        assert!(begun.elapsed() < LIMIT, "it stands still after the dump");
        std::thread::sleep(Duration::from_millis(50));
    }

    let (pipe, _socket) = dump_into_pipe(&lab);
    // The first bytes have come; the rest waits for a reader.
    let mut first = [0; 16];
    assert!(rustix::io::read(&pipe, &mut first).expect("a dump") > 0);
    std::thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    vm.signal(15);
    vm.until("power-button", LIMIT);
    vm.signal(15);
    let ended = vm.end(LIMIT);
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
    assert_eq!(ended.code, Some(14), "{}", ended.err);
    assert!(ended.err.contains("its volumes are flushed") && !ended.err.contains("not-"), "{}", ended.err);
    assert!(lab.export()[5 * 4096..6 * 4096].iter().all(|b| *b == 0x55));
    let log = lab.audit();
    let outcomes = log.iter().filter(|e| e["details"]["what"] == "outcome").map(|e| &e["details"]["done"]);
    assert_eq!(outcomes.collect::<Vec<_>>(), ["false", "false"], "{log:#?}");
    assert!(!log.iter().any(|e| e["kind"] == "report-gap"), "{log:#?}");
}
